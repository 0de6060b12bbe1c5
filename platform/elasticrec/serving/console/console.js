// Answers of the service in, the page as it stands out. Nothing is kept but keys (this tab) and the theme.
"use strict";

const HEALTH_MS = 5_000, DEBOUNCE_MS = 180, SHOWN_HISTORY = 50, SHOWN = 10, KEPT_TRIPS = 40;
const at = (id) => document.getElementById(id);
const state = { user: null, items: [], trips: [], asked: 0, searched: 0, operator: true, lookup: new AbortController() };

// --- the service

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

function keyFor(path) {
  const admin = path.startsWith("v1/admin/") ? sessionStorage.getItem("elasticrec.admin") : null;
  return admin ?? sessionStorage.getItem("elasticrec.key");
}

async function call(path, body, signal) {
  const headers = {}, key = keyFor(path);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  if (path === "v1/admin/versions") headers["x-request-timeout-ms"] = "60000";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  const admin = path.startsWith("v1/admin/");
  if (answer.status === 401 && !admin) at("keys").hidden = false;
  if ((answer.status === 401 || answer.status === 403) && admin) at("admin-form").hidden = false;
  throw new Refused(answer.status, content.detail ?? `the service answered ${answer.status}`);
}

// Whatever goes wrong is shown, and read aloud.
async function attempt(work) {
  try {
    await work();
    at("problem").hidden = true;
    return true;
  } catch (error) {
    at("problem").textContent = error instanceof Refused ? error.message : `the service cannot be reached (${error.message})`;
    at("problem").hidden = false;
    return false;
  }
}

function say(text) {
  at("said").textContent = text;
}

// --- making elements; text is never markup

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  const { className, ...attributes } = options;
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const titled = (item) => item.title ?? item.item_id;

// --- a user

async function show(user) {
  state.user = user;
  state.items = [];
  at("user").value = user;
  at("for-whom").textContent = `for ${user}`;
  at("sides").replaceChildren();
  if (await attempt(refresh)) say(`${state.items.length} recommendations for user ${user}`);
}

async function refresh() {
  const turn = ++state.asked, started = performance.now();
  const [answer, history] = await Promise.all([
    call("v1/recommend", { user_id: state.user, k: SHOWN, explain: true }).then((answer) => {
      answer.trip_ms = performance.now() - started;
      return answer;
    }),
    call(`v1/users/${encodeURIComponent(state.user)}?limit=${SHOWN_HISTORY}`),
  ]);
  if (turn !== state.asked) return; // a newer answer is on its way
  drawItems(answer);
  drawHistory(history);
  drawTimes(answer);
  at("version").textContent = answer.model_version;
}

function drawItems(answer) {
  const before = new Set(state.items.map((item) => item.item_id));
  const places = answer.items.map((item, place) => {
    const fresh = before.size > 0 && !before.has(item.item_id);
    const score = item.score === null ? "" : item.score.toFixed(2);
    const button = make(
      "button",
      { type: "button", className: fresh ? "new" : "", "data-item": item.item_id },
      make("span", { className: "place", "aria-hidden": "true" }, `${place + 1}`),
      make("span", { className: "title" }, titled(item)),
      make("span", { className: "score", title: "the model's score" }, score),
    );
    const reason = reasonOf(item, answer);
    if (reason) button.append(make("span", { className: "reason" }, reason));
    button.addEventListener("click", () => take(item, at("items"), place));
    return make("li", {}, button);
  });
  at("items").replaceChildren(...places);
  state.items = answer.items;
}

function reasonOf(item, answer) {
  if (answer.degraded) return "popular; the model is down or late";
  if (answer.source === "popularity") return "popular";
  return item.because ? `because you took ${titled(item.because)}` : "";
}

function drawHistory(history) {
  at("history-total").textContent = `(${history.total})`;
  const lines = history.events.toReversed().map((event) =>
    make("li", {}, make("span", {}, titled(event)), make("span", { className: "when" }, whenOf(event))),
  );
  at("history").replaceChildren(...(lines.length ? lines : [make("li", { className: "hint" }, "nothing yet")]));
}

function whenOf(event) {
  const day = event.timestamp ? new Date(event.timestamp * 1_000).toISOString().slice(0, 10) : "";
  return [event.event_type, day].filter(Boolean).join(" · ");
}

// An event is acknowledged when it is in every answer, so the next list already knows it.
async function take(item, list, place) {
  if (state.user === null) {
    say("choose a user first");
    at("user").focus();
    return;
  }
  const done = await attempt(async () => {
    const event = { user_id: state.user, item_id: item.item_id, event_type: "click", event_id: crypto.getRandomValues(new Uint32Array(4)).join("-") };
    await call("v1/events", { events: [event] });
    await refresh();
  });
  if (!done) return;
  say(`${titled(item)} was taken; ${state.items.length} new recommendations`);
  const buttons = list.querySelectorAll("button"); // focus stays where it was, also when the list is a new one
  buttons[Math.min(place, buttons.length - 1)]?.focus();
}

// Up and down within a list, and out of its top into the field above.
function moveBy(list, event, above) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const buttons = [...list.querySelectorAll("button")];
  const next = buttons.indexOf(document.activeElement) + step;
  (next < 0 ? above : buttons[Math.min(next, buttons.length - 1)])?.focus();
}

// --- users to pick

async function findUsers(prefix) {
  if (!state.operator) return; // every refused try would be a line of the audit
  state.lookup.abort(); // the service asks its store for one at a time
  const { signal } = (state.lookup = new AbortController());
  try {
    const { user_ids: found } = await call(`v1/admin/users?limit=12&prefix=${encodeURIComponent(prefix)}`, undefined, signal);
    at("users").replaceChildren(...found.map((user) => make("option", { value: user })));
    if (!prefix) drawPicks(found.slice(0, 8));
  } catch (error) {
    if (error.name === "AbortError" || error.status === 429) return; // a newer lookup has taken its place
    state.operator = false; // ids are typed, then
    at("admin-form").hidden = false;
  }
}

function drawPicks(found) {
  const picks = found.map((user) => {
    const button = make("button", { type: "button" }, user);
    button.addEventListener("click", () => show(user));
    return button;
  });
  at("users-known").replaceChildren(...picks);
}

// --- search

async function search() {
  const text = at("query").value.trim(), turn = ++state.searched;
  if (!text) {
    at("found").replaceChildren();
    return;
  }
  const who = state.user === null ? "" : `&user_id=${encodeURIComponent(state.user)}`;
  await attempt(async () => {
    const answer = await call(`v1/search?k=8&q=${encodeURIComponent(text)}${who}`);
    if (turn !== state.searched) return;
    drawFound(answer.items);
    say(answer.items.length ? `${answer.items.length} found` : "nothing found");
  });
}

function drawFound(items) {
  const lines = items.map((item, place) => {
    const score = make("span", { className: "score" }, item.score.toFixed(2));
    const button = make("button", { type: "button", "data-item": item.item_id }, make("span", {}, titled(item)), score);
    button.addEventListener("click", () => take(item, at("found"), place));
    return make("li", {}, button);
  });
  at("found").replaceChildren(...(lines.length ? lines : [make("li", { className: "hint" }, "nothing found")]));
}

function debounced(work, wait_ms) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, wait_ms);
  };
}

// --- times

const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

function drawTimes(answer) {
  const { total, ...stages } = answer.timings_ms;
  at("total").textContent = milliseconds(total);
  at("trip").textContent = milliseconds(answer.trip_ms);
  const longest = Math.max(...Object.values(stages), 0.001);
  const rows = Object.entries(stages).map(([stage, took_ms]) => {
    const bar = make("div", { className: "bar" });
    bar.style.width = `${(100 * took_ms) / longest}%`;
    const number = make("td", { className: "number" }, milliseconds(took_ms));
    return make("tr", {}, make("th", { scope: "row" }, stage), make("td", { "aria-hidden": "true" }, bar), number);
  });
  at("stages").tBodies[0].replaceChildren(...rows);
  state.trips = [...state.trips, answer.trip_ms].slice(-KEPT_TRIPS);
  drawTrips();
}

function drawTrips() {
  const highest = Math.max(...state.trips, 1), step = 200 / (KEPT_TRIPS - 1);
  const points = state.trips.map((trip_ms, place) => `${place * step},${38 - (34 * trip_ms) / highest}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.join(" "));
  at("trips").replaceChildren(line);
  at("trips").toggleAttribute("hidden", state.trips.length < 2);
  at("trips").setAttribute("aria-label", `Answer times of this session, up to ${milliseconds(highest)}`);
}

// --- versions

async function compare() {
  if (state.user === null) {
    say("choose a user first");
    at("user").focus();
    return;
  }
  await attempt(async () => {
    const { answers } = await call(`v1/admin/compare?k=${SHOWN}&user_id=${encodeURIComponent(state.user)}`);
    drawSides(answers);
  });
}

function drawSides(answers) {
  const known = new Set(answers.production.items.map((item) => item.item_id));
  const sides = Object.entries(answers).map(([role, answer]) => {
    const lines = answer.items.map((item) => {
      const other = !known.has(item.item_id);
      return make("li", { className: other ? "other" : "" }, titled(item), other ? make("span", { className: "visually-hidden" }, " (not in production)") : "");
    });
    const shared = answer.items.filter((item) => known.has(item.item_id)).length;
    const told = role === "production" ? milliseconds(answer.took_ms) : `${milliseconds(answer.took_ms)}, ${shared} of ${answer.items.length} as in production`;
    return make("div", { "data-role": role }, make("h3", {}, `${role} `, make("span", {}, answer.model_version)), make("p", { className: "hint" }, told), make("ol", {}, ...lines));
  });
  if (!answers.canary) sides.push(make("p", { className: "hint" }, "There is no canary at the moment."));
  at("sides").replaceChildren(...sides);
}

let production; // as the label was when it was last looked at

async function findVersions() {
  try {
    const { versions, labels, label } = await call("v1/admin/versions");
    production = labels[label];
    const labelled = (version) => Object.keys(labels).filter((label) => labels[label] === version).join(", ");
    const options = versions.toReversed().map((version) => {
      const marks = labelled(version);
      return make("option", { value: version }, marks ? `${version} (${marks})` : version);
    });
    at("target").replaceChildren(...options);
  } catch {
    production = undefined;
    at("target").replaceChildren(make("option", { value: "latest" }, "latest"));
  }
}

async function move() {
  const action = at("action").value, wish = { action };
  if (action !== "rollback") wish.version = at("target").value;
  else if (production) wish.leaving = production; // sent twice, it moves once
  if (action === "canary") wish.percent = Number(at("percent").value);
  const what = action === "rollback" ? "roll back" : `${action} version ${wish.version}`;
  if (!confirm(`${what}: all replicas follow. Do it?`)) return;
  at("move").disabled = true;
  at("moved").textContent = `${what}: every replica loads and checks it …`;
  const done = await attempt(async () => {
    at("moved").textContent = (await call("v1/admin/versions", wish).catch(goesOn)).told;
  });
  if (!done) at("moved").textContent = `refused: ${at("problem").textContent}`;
  at("move").disabled = false;
  await findVersions();
}

// A move outlives its request.
function goesOn(error) {
  if (error.status !== 504) throw error;
  return { told: "it takes longer than a request may, and goes on; look at the labels again in a minute" };
}

function drawMove() {
  at("version-part").hidden = at("action").value === "rollback";
  at("percent-part").hidden = at("action").value !== "canary";
}

// --- health

async function checkHealth() {
  if (document.hidden) return;
  const [text, kind] = await healthOf();
  if (at("health").textContent !== text) at("health").textContent = text; // told once, not every five seconds
  at("health").className = `badge ${kind}`;
}

async function healthOf() {
  try {
    const answer = await fetch("readyz");
    const content = await answer.json();
    if (!answer.ok) return [`not ready: ${content.detail ?? answer.status}`, "bad"];
    const refused = content.refused.length ? `, refused: ${content.refused.join(", ")}` : "";
    return [`ready${refused}`, refused ? "bad" : "good"];
  } catch {
    return ["not reachable", "bad"];
  }
}

// --- theme: the system's, until somebody says otherwise

function drawTheme() {
  const dark = (localStorage.getItem("elasticrec.theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  at("theme").setAttribute("aria-pressed", String(dark));
}

function turnTheme() {
  localStorage.setItem("elasticrec.theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  drawTheme();
}

// --- wiring

function onSubmit(id, work) {
  at(id).addEventListener("submit", (event) => {
    event.preventDefault();
    work();
  });
}

function keep(field, name, form) {
  sessionStorage.setItem(name, at(field).value.trim());
  at(field).value = "";
  at(form).hidden = true;
  at("problem").hidden = true;
  state.operator = true;
  findUsers("");
  findVersions();
  if (state.user !== null) show(state.user);
}

onSubmit("keys", () => keep("key", "elasticrec.key", "keys"));
onSubmit("admin-form", () => keep("admin-key", "elasticrec.admin", "admin-form"));
onSubmit("user-form", () => show(at("user").value.trim()));
onSubmit("search-form", search);
onSubmit("move-form", move);
at("query").addEventListener("input", debounced(search, DEBOUNCE_MS));
at("user").addEventListener("input", debounced(() => findUsers(at("user").value), DEBOUNCE_MS));
at("items").addEventListener("keydown", (event) => moveBy(at("items"), event, at("query")));
at("found").addEventListener("keydown", (event) => moveBy(at("found"), event, at("query")));
at("query").addEventListener("keydown", (event) => moveBy(at("found"), event, null));
at("compare").addEventListener("click", compare);
at("action").addEventListener("change", drawMove);
at("theme").addEventListener("click", turnTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTheme);
document.addEventListener("visibilitychange", checkHealth);
drawTheme();
drawMove();
checkHealth();
setInterval(checkHealth, HEALTH_MS);
findUsers("");
findVersions();
