// Calls to the API. The access token lives in this module only; the refresh token in the tab's session storage.

const REFRESH = "tenfold.refresh";
let accessToken = null;
let refreshing = null;

/** An answer that is a problem document (RFC 9457). `fields` maps names of inputs to what is wrong with them. */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || document.title || `The server answered ${status}`);
    this.status = status;
    this.fields = new Map((document.errors ?? []).map((e) => [e.pointer.replace(/^[/?]/, ""), e.detail]));
  }
}

export async function problemOf(response) {
  const text = await response.text();
  return parseProblem(response.status, text);
}

function parseProblem(status, text) {
  try {
    return new Problem(status, JSON.parse(text));
  } catch {
    return new Problem(status, {});
  }
}

export const hasSession = () => accessToken !== null || sessionStorage.getItem(REFRESH) !== null;

function keep(tokens) {
  accessToken = tokens.access_token;
  sessionStorage.setItem(REFRESH, tokens.refresh_token);
}

export function forget() {
  accessToken = null;
  sessionStorage.removeItem(REFRESH);
}

/** fetch() with the token; a token that has run out is renewed once. Resolves to the response, whatever its status. */
export async function authorized(path, options = {}) {
  const send = () =>
    fetch(path, { ...options, headers: { ...options.headers, Authorization: `Bearer ${accessToken}` } });
  if (accessToken === null) await renew();
  let response = await send();
  if (response.status === 401 && sessionStorage.getItem(REFRESH)) {
    await renew();
    response = await send();
  }
  return response;
}

/** One renewal at a time, because a refresh token can be spent only once. */
function renew() {
  refreshing ??= (async () => {
    const token = sessionStorage.getItem(REFRESH);
    if (token === null) throw new Problem(401, { title: "Please log in" });
    const response = await post("/api/v1/sessions/refresh", { refresh_token: token });
    if (response.status === 401) forget();
    if (!response.ok) throw await problemOf(response);
    keep(await response.json());
  })().finally(() => {
    refreshing = null;
  });
  return refreshing;
}

const post = (path, body) =>
  fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** The JSON of an answer, or null where there is none. Throws `Problem`. */
export async function call(path, options) {
  const response = await authorized(path, options);
  if (!response.ok) throw await problemOf(response);
  return response.status === 204 ? null : response.json();
}

export async function register(account) {
  const response = await post("/api/v1/users", account);
  if (!response.ok) throw await problemOf(response);
}

/** A call that needs no session. Throws `Problem`. */
export async function send(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  if (!response.ok) throw await problemOf(response);
}

export async function logIn(credentials) {
  const response = await post("/api/v1/sessions", credentials);
  if (!response.ok) throw await problemOf(response);
  keep(await response.json());
}

export async function logOut() {
  try {
    await authorized("/api/v1/sessions/current", { method: "DELETE" });
  } finally {
    forget(); // whatever the server says, this tab is done
  }
}

/** Uploads one file; `onProgress` is told the part that is sent, from 0 to 1. */
export async function upload(file, onProgress) {
  const key = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
  await call("/api/v1/media/usage").catch(() => null); // renews the token, which an XMLHttpRequest cannot
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/api/v1/media");
    request.setRequestHeader("Authorization", `Bearer ${accessToken}`);
    request.setRequestHeader("Content-Type", file.type || "application/octet-stream");
    request.setRequestHeader("Idempotency-Key", key);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () =>
      request.status < 300
        ? resolve(JSON.parse(request.responseText))
        : reject(parseProblem(request.status, request.responseText));
    request.onerror = () => reject(new Problem(0, { title: "The connection was lost" }));
    request.send(file);
  });
}
