// Server-sent events read through fetch, because EventSource cannot send a token.

import { authorized } from "./api.js";

const SILENCE_MS = 45_000; // heartbeats come every 15 s; three missing ones mean that nobody is there
const LONGEST_WAIT_MS = 30_000;

/** Calls `onEvent(name, data)` for each event and `onState(connected)`, over reconnects, until `stop()` is called. */
export function follow(path, onEvent, onState) {
  let lastId = null;
  let wait = 1000;
  let stopped = false;
  let current = null;

  async function connect() {
    current = new AbortController();
    const headers = { Accept: "text/event-stream", ...(lastId !== null && { "Last-Event-ID": lastId }) };
    const response = await authorized(path, { headers, signal: current.signal, cache: "no-store" });
    if (!response.ok) {
      if (response.status === 422) lastId = null; // too old an id: start from now
      throw new Error(`stream answered ${response.status}`);
    }
    onState(true);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let watchdog = null;
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => current.abort(), SILENCE_MS);
    };
    try {
      for (;;) {
        alive();
        const { done, value } = await reader.read();
        if (done) return;
        wait = 1000;
        const frames = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
        rest = frames.pop();
        frames.forEach(take);
      }
    } finally {
      clearTimeout(watchdog);
    }
  }

  function take(frame) {
    let name = "message";
    const data = [];
    for (const line of frame.split("\n")) {
      const [, field, text] = /^([^:]*):? ?(.*)$/.exec(line);
      if (field === "event") name = text;
      else if (field === "data") data.push(text);
      else if (field === "id") lastId = text;
    }
    if (data.length) onEvent(name, JSON.parse(data.join("\n")));
  }

  (async () => {
    while (!stopped) {
      try {
        await connect();
      } catch (error) {
        if (error.status === 401) stopped = true;
      }
      onState(false);
      if (!stopped) await new Promise((next) => setTimeout(next, wait * (0.5 + Math.random() / 2)));
      wait = Math.min(wait * 2, LONGEST_WAIT_MS);
    }
  })();

  return function stop() {
    stopped = true;
    current?.abort();
  };
}
