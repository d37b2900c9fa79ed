// The page: what is shown, and what happens when somebody clicks.

import * as api from "./api.js";
import { follow } from "./stream.js";

const $ = (id) => document.getElementById(id);
const fromTemplate = (id) => $(id).content.firstElementChild.cloneNode(true);
const show = (element, visible) => element.toggleAttribute("hidden", !visible);

const media = new Map(); // id -> what the API says of it
const notifications = new Map();
let nextPage = null;
let unread = 0;
let stopFollowing = null;
let viewed = null;

function say(text) {
  $("message").textContent = text ?? "";
  show($("message"), Boolean(text));
}

function note(text) {
  $("note").textContent = text ?? "";
  show($("note"), Boolean(text));
}

/** Runs `work`; what goes wrong is said at the top, and an ended session leads back to the entrance. */
async function attempt(work) {
  try {
    say(null);
    return await work();
  } catch (error) {
    if (error instanceof api.Problem && error.status === 401) leave("Your session has ended. Please log in again.");
    else say(error instanceof api.Problem ? error.message : "The server cannot be reached.");
    return undefined;
  }
}

// Entrance

function choose(tab) {
  for (const form of ["forgotten", "reset"]) show($(form), form === tab);
  for (const [button, form] of [["tab-log-in", "log-in"], ["tab-register", "register"]]) {
    const chosen = form === tab;
    $(button).setAttribute("aria-selected", chosen);
    $(button).tabIndex = chosen ? 0 : -1;
    show($(form), chosen);
  }
}

function showProblems(form, problem) {
  for (const input of form.querySelectorAll("input")) {
    const detail = problem?.fields?.get(input.name);
    input.toggleAttribute("aria-invalid", false);
    document.getElementById(`${form.id}-${input.name}-problem`)?.remove();
    if (!detail) continue;
    const note = Object.assign(document.createElement("span"), {
      className: "field-problem",
      id: `${form.id}-${input.name}-problem`,
      textContent: detail,
    });
    input.after(note);
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", note.id);
  }
  const general = form.querySelector(".problem");
  const named = problem?.fields?.size > 0;
  general.textContent = problem && !named ? problem.message : "";
  show(general, Boolean(general.textContent));
  form.querySelector('[aria-invalid="true"]')?.focus();
}

function onSubmit(form, work, done = enter) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("[type=submit]");
    button.disabled = true;
    showProblems(form, null);
    try {
      await work(Object.fromEntries(new FormData(form)));
      form.reset();
      await done();
    } catch (error) {
      showProblems(form, error instanceof api.Problem ? error : { message: "The server cannot be reached." });
    } finally {
      button.disabled = false;
    }
  });
}

async function enter() {
  show($("entrance"), false);
  show($("home"), true);
  const home = await api.call("/api/v1/home");
  $("who").textContent = home.user?.display_name ?? "";
  for (const id of ["who", "inbox-open", "log-out", "live"]) show($(id), true);
  if (home.degraded.length) say(`Not everything works at the moment: ${home.degraded.join(", ")}.`);
  await Promise.all([attempt(loadPhotos), attempt(loadInbox)]);
  stopFollowing?.();
  stopFollowing = follow("/api/v1/notifications/stream", onEvent, onState);
}

function leave(reason = null) {
  stopFollowing?.();
  stopFollowing = null;
  api.forget();
  media.clear();
  notifications.clear();
  $("gallery").replaceChildren();
  $("uploads").replaceChildren();
  $("notifications").replaceChildren();
  for (const id of ["home", "inbox", "who", "inbox-open", "log-out", "live"]) show($(id), false);
  $("viewer").close();
  show($("entrance"), true);
  say(reason);
  $("log-in").elements.email.focus();
}

// Photos

async function loadPhotos() {
  const page = await api.call(`/api/v1/media?limit=24${nextPage ? `&cursor=${encodeURIComponent(nextPage)}` : ""}`);
  nextPage = page.next_cursor;
  for (const item of page.items) showPhoto(item, "end");
  show($("more"), nextPage !== null);
  show($("empty"), media.size === 0);
}

function showPhoto(item, where = "start") {
  const known = media.get(item.id);
  if (known && known.version > item.version) return; // an older answer that came later
  media.set(item.id, item);
  show($("empty"), false);
  let tile = document.getElementById(`photo-${item.id}`);
  if (!tile) {
    tile = fromTemplate("tile");
    tile.id = `photo-${item.id}`;
    tile.querySelector("button").addEventListener("click", () => view(item.id));
    if (where === "start") $("gallery").prepend(tile);
    else $("gallery").append(tile);
  }
  tile.className = `tile ${item.status}`;
  tile.querySelector(".title").textContent = item.title || "Untitled";
  const frame = tile.querySelector(".frame");
  if (item.placeholder?.startsWith("data:image/")) frame.style.backgroundImage = `url("${item.placeholder}")`;
  else if (/^#[0-9a-f]{6}$/i.test(item.placeholder ?? "")) frame.style.backgroundColor = item.placeholder;
  tile.querySelector(".state").textContent =
    { processing: "Processing", failed: `Failed: ${item.failure ?? "unknown"}` }[item.status] ?? "";
  const image = tile.querySelector("img");
  const source = variant(item, "medium") ?? variant(item, "small");
  if (item.status === "ready" && source && image.getAttribute("src") !== source.url) {
    image.alt = item.title || "Photo";
    image.srcset = item.variants.map((v) => `${v.url} ${v.width}w`).join(", ");
    image.sizes = "13rem";
    image.src = source.url;
  }
  show(image, item.status === "ready");
  if (viewed === item.id) fillViewer(item);
}

const variant = (item, name) => item.variants.find((v) => v.name === name);

async function refreshPhoto(id) {
  const response = await api.authorized(`/api/v1/media/${encodeURIComponent(id)}`);
  if (response.status === 404) return removePhoto(id);
  if (!response.ok) throw await api.problemOf(response);
  return showPhoto(await response.json());
}

function removePhoto(id) {
  media.delete(id);
  document.getElementById(`photo-${id}`)?.remove();
  show($("empty"), media.size === 0);
  if (viewed === id) $("viewer").close();
}

async function uploadAll(files) {
  for (const file of files) {
    const row = fromTemplate("upload");
    const outcome = row.querySelector(".outcome");
    const bar = row.querySelector("progress");
    row.querySelector(".name").textContent = file.name;
    bar.setAttribute("aria-label", `Upload of ${file.name}`);
    $("uploads").prepend(row);
    try {
      const item = await api.upload(file, (part) => (bar.value = part));
      showPhoto(item);
      attempt(() => nameAfter(item.id, file));
      bar.value = 1;
      outcome.textContent = "uploaded";
      setTimeout(() => row.remove(), 4000);
    } catch (error) {
      outcome.textContent = error.message;
      outcome.className = "outcome failed";
      if (error.status === 401) leave("Your session has ended. Please log in again.");
    }
  }
}

/** What is uploaded has no title yet; the file's name is better than none. */
async function nameAfter(id, file) {
  const title = file.name.replace(/\.\w+$/, "").slice(0, 200);
  const headers = { "Content-Type": "application/json" };
  showPhoto(await api.call(`/api/v1/media/${id}`, { method: "PATCH", headers, body: JSON.stringify({ title }) }));
}

function view(id) {
  viewed = id;
  fillViewer(media.get(id));
  $("viewer").showModal();
}

function fillViewer(item) {
  $("viewer-title").textContent = item.title || "Untitled";
  const large = variant(item, "large") ?? variant(item, "medium") ?? variant(item, "small");
  show($("viewer-image"), Boolean(large));
  if (large) $("viewer-image").src = large.url;
  $("viewer-image").alt = item.title || "Photo";
  $("viewer-variants").replaceChildren(
    ...item.variants.map((v) => {
      const link = Object.assign(document.createElement("a"), { href: v.url, target: "_blank", rel: "noopener" });
      link.textContent = `${v.name} ${v.width} × ${v.height}, ${Math.ceil(v.bytes / 1024)} KiB`;
      const line = document.createElement("li");
      line.append(link);
      return line;
    }),
  );
}

// Inbox

async function loadInbox() {
  const page = await api.call("/api/v1/notifications?limit=30");
  for (const item of page.items.toReversed()) showNotification(item);
  setUnread(page.unread);
}

function showNotification(item) {
  const known = document.getElementById(`note-${item.id}`);
  const line = fromTemplate("notification");
  line.id = `note-${item.id}`;
  line.classList.toggle("unread", !item.read_at);
  line.querySelector("strong").textContent = item.title;
  line.querySelector("p").textContent = item.body;
  const time = line.querySelector("time");
  time.dateTime = item.created_at;
  time.textContent = new Date(item.created_at).toLocaleString();
  const button = line.querySelector("button");
  show(button, !item.read_at);
  button.addEventListener("click", () => attempt(() => markRead(item.id)));
  if (known) known.replaceWith(line);
  else $("notifications").prepend(line);
  notifications.set(item.id, item);
  show($("inbox-empty"), false);
}

function setUnread(count) {
  unread = Math.max(0, count);
  $("unread").textContent = unread;
  $("unread").setAttribute("aria-label", `${unread} unread`);
  show($("unread"), unread > 0);
  document.title = unread > 0 ? `(${unread}) Tenfold` : "Tenfold";
}

async function markRead(id) {
  await api.call(`/api/v1/notifications/${id}/read`, { method: "PUT" });
  showNotification({ ...notifications.get(id), read_at: new Date().toISOString() });
  setUnread(unread - 1);
  $("inbox-title").focus();
}

async function markAllRead() {
  await api.call("/api/v1/notifications/read", { method: "PUT" });
  for (const item of [...notifications.values()]) {
    if (!item.read_at) showNotification({ ...item, read_at: new Date().toISOString() });
  }
  setUnread(0);
}

function openInbox(open) {
  show($("inbox"), open);
  $("inbox-open").setAttribute("aria-expanded", open);
  (open ? $("inbox-title") : $("inbox-open")).focus();
}

// Live

function onEvent(name, data) {
  if (name === "media") attempt(() => refreshPhoto(data.media_id ?? data.id));
  if (name === "notification" && !notifications.has(data.id)) {
    showNotification(data);
    setUnread(unread + (data.read_at ? 0 : 1));
  }
}

function onState(connected) {
  $("live").classList.toggle("on", connected);
  $("live-text").textContent = connected ? "live" : "reconnecting";
}

// Wiring

for (const tab of ["log-in", "register"]) $(`tab-${tab}`).addEventListener("click", () => choose(tab));
document.querySelector(".tabs").addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const other = $("tab-log-in").getAttribute("aria-selected") === "true" ? "register" : "log-in";
  choose(other);
  $(`tab-${other}`).focus();
});
onSubmit($("log-in"), api.logIn);
$("forgot").addEventListener("click", () => choose("forgotten"));
onSubmit(
  $("forgotten"),
  (wanted) => api.send("POST", "/api/v1/password-resets", wanted),
  () => {
    choose("log-in");
    note("If there is an account with this address, a link is on its way to it.");
  },
);
let resetToken = null;
onSubmit(
  $("reset"),
  (chosen) => api.send("PUT", `/api/v1/password-resets/${encodeURIComponent(resetToken)}`, chosen),
  () => {
    choose("log-in");
    note("Your password is set. Log in with it.");
  },
);

/** Links from emails: their tokens stand behind the #, which browsers keep to themselves. */
async function followLink() {
  const [, purpose, token] = location.hash.match(/^#(verify|reset)=([\w-]+)$/) ?? [];
  if (!token) return;
  history.replaceState(null, "", location.pathname);
  if (purpose === "reset") {
    resetToken = token;
    leave();
    choose("reset");
    $("reset").elements.new_password.focus();
    return;
  }
  try {
    await api.send("PUT", `/api/v1/email-verifications/${encodeURIComponent(token)}`);
    note("Thank you, your address is confirmed.");
  } catch (error) {
    say(error instanceof api.Problem ? error.message : "The server cannot be reached.");
  }
}
onSubmit($("register"), async (account) => {
  await api.register(account);
  await api.logIn({ email: account.email, password: account.password });
});
$("log-out").addEventListener("click", async () => {
  await api.logOut().catch(() => null);
  leave();
});

$("files").addEventListener("change", (event) => {
  uploadAll([...event.target.files]);
  event.target.value = "";
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if ($("home").hidden || ![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") uploadAll([...event.dataTransfer.files]);
  });
}
$("more").addEventListener("click", () => attempt(loadPhotos));
$("inbox-open").addEventListener("click", () => openInbox($("inbox").hidden));
$("inbox-close").addEventListener("click", () => openInbox(false));
$("read-all").addEventListener("click", () => attempt(markAllRead));
$("inbox").addEventListener("keydown", (event) => event.key === "Escape" && openInbox(false));
$("viewer").addEventListener("close", () => (viewed = null));
$("viewer-close").addEventListener("click", () => $("viewer").close());
$("viewer-delete").addEventListener("click", () =>
  attempt(async () => {
    const id = viewed;
    const item = media.get(id);
    await api.call(`/api/v1/media/${id}`, { method: "DELETE", headers: { "If-Match": `"v${item.version}"` } });
    removePhoto(id);
  }),
);

window.addEventListener("hashchange", followLink);
const arrivesToReset = location.hash.startsWith("#reset=");
if (api.hasSession() && !arrivesToReset) {
  attempt(enter).then(() => show($("entrance"), !api.hasSession()));
} else {
  show($("entrance"), true);
}
followLink();
