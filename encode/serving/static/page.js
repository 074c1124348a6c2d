// Asks the routes of this process and shows what they answer. Names of items are untrusted: what comes back becomes text
// nodes and attributes of our own making, never markup.

const POLL_MS = 2_000;
const WINDOW_MS = 60_000;
const PATIENCE_MS = 10_000;
const SCORING = new Set(["/v1/score", "/invocations", "/v2/models/{name}/infer"]);
const LARGEST_ID = 2n ** 63n - 1n;
const MOST_FILLED_IN = 12;
const MOST_LISTED = 8;
const OLD_DAYS = 2; // as for the alert on the age of the snapshot

const by = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const day = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 10);

// --- elements --------------------------------------------------------------------------------------------------

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function say(id, text) {
  by(id).hidden = !text;
  if (by(id).textContent !== text) by(id).textContent = text;
}

function bar(share, text, kind = "") {
  const length = svg("rect", { width: percent(Math.min(share, 1)), height: "100%" });
  return html("div", { class: `bar ${kind}` }, svg("svg", { "aria-hidden": "true" }, length), html("span", {}, text));
}

function describe(list, pairs) {
  list.replaceChildren(...pairs.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))));
}

// --- asking ----------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

// Ids have up to 63 bits, more than a number holds here: those that would be rounded stay text.
const parse = (text) =>
  JSON.parse(text, (_, value, context) =>
    Number.isInteger(value) && !Number.isSafeInteger(value) ? (context?.source ?? value) : value,
  );

function detailOf(text, status) {
  try {
    const detail = parse(text).detail;
    return typeof detail === "string" ? detail : detail.map((one) => `${one.loc.join(".")}: ${one.msg}`).join("; ");
  } catch {
    return `status ${status}`;
  }
}

async function ask(path, body) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  const method = body === undefined ? "GET" : "POST";
  let answer, text;
  try {
    answer = await fetch(path, { method, headers, body, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    text = await answer.text();
  } catch {
    throw new Refused(0, "no answer from the server");
  }
  if (answer.status === 401) lock(key);
  if (!answer.ok) throw new Refused(answer.status, detailOf(text, answer.status));
  return answer.headers.get("Content-Type").startsWith("application/json") ? parse(text) : text;
}

function idsIn(text) {
  const ids = text.split(/[\s,;]+/).filter(Boolean);
  const wrong = ids.find((id) => !/^[1-9]\d{0,18}$/.test(id) || BigInt(id) > LARGEST_ID);
  if (wrong !== undefined) throw new Refused(422, `“${wrong}” is not an id; expected a whole number from 1 to ${LARGEST_ID}`);
  return ids;
}

// Runs what a form or button asks for; where it fails, says so beside it.
async function attempt(place, work) {
  say(place, "");
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(place, error.status === 401 ? "The server asks for a key that it knows: give it above." : error.message);
  }
}

// --- key -------------------------------------------------------------------------------------------------------

let locked = false;

function lock(key) {
  if (key !== sessionStorage.getItem("key")) return; // it was replaced meanwhile
  locked = true;
  by("key").open = true;
  say("key-problem", key ? "The server does not know this key." : "The server asks for a key.");
}

function useKey(key) {
  key ? sessionStorage.setItem("key", key) : sessionStorage.removeItem("key");
  by("key-text").value = "";
  by("key").open = locked = false;
  say("key-problem", "");
  poll();
}

by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = by("key-text").value.trim();
  if (/^[\x21-\x7e]+$/.test(key)) useKey(key);
  else say("key-problem", "Not a key: expected letters, digits and signs without spaces.");
});
by("key-forget").addEventListener("click", () => useKey(""));

// --- release and load ------------------------------------------------------------------------------------------

let timer, turn = 0, goneSince = null;
let samples = [];
const stale = new Set(); // bundles whose snapshot an answer called stale

async function poll() {
  clearTimeout(timer);
  const mine = ++turn;
  const asked = ["/ready", ...(locked ? [] : ["/metrics"])];
  const [ready, metrics] = await Promise.allSettled(asked.map((path) => ask(path)));
  const [release] = await Promise.allSettled(locked ? [] : [ask("/v1/release")]); // not at work while that is counted
  if (mine !== turn) return;
  showState(ready, release?.value);
  showRelease(release?.value);
  showLoad(metrics?.value);
  if (!document.hidden) timer = setTimeout(poll, POLL_MS);
}

function showState(ready, release) {
  const isReady = ready.status === "fulfilled";
  const gone = !isReady && ready.reason.status === 0;
  goneSince = gone ? (goneSince ?? new Date().toLocaleTimeString()) : null;
  const isStale = isReady && stale.has(release?.bundle?.id);
  say("state", gone ? "no answer" : isStale ? "ready, stale snapshot" : isReady ? "ready" : "not ready");
  by("state").className = `pill ${isStale ? "warn" : isReady ? "good" : "bad"}`;
  const trying = `No answer from the server since ${goneSince}; trying again every ${POLL_MS / 1000} s.`;
  const why = release?.error ?? ready.reason?.message;
  say("banner", gone ? trying : isReady ? "" : `The server takes no traffic: ${why}`);
}

function showRelease(release) {
  by("look").disabled = !release;
  if (!release) {
    if (locked) {
      describe(by("release"), []);
      say("age", "");
    }
    return;
  }
  const { bundle, previous, challenger, refused, error } = release;
  const short = (one) => `model version ${one.model_version}, snapshot ${one.snapshot}`;
  const pairs = bundle
    ? [
        ["Bundle", bundle.id],
        ["Model version", bundle.model_version],
        ["Space", bundle.space],
        ["Snapshot", bundle.snapshot],
        ["Behaviors before", `${bundle.as_of}, ${daysAgo(bundle)} ago`],
      ]
    : [["Bundle", "none yet"]];
  if (challenger) pairs.push(["Challenger", short(challenger)]);
  if (previous) pairs.push(["Before it", short(previous)]);
  for (const one of refused) pairs.push(["Refused", `${short(one)}: ${one.why}`]);
  describe(by("release"), pairs);
  say("age", bundle ? ageOf(bundle) : "");
  say("release-problem", error ? `The newest look failed: ${error}` : "");
}

const ageInDays = ({ as_of }) => Math.max(Math.floor((Date.now() - Date.parse(as_of)) / 86_400_000), 0);

function daysAgo(bundle) {
  const days = ageInDays(bundle);
  return `${days.toLocaleString("en")} day${days === 1 ? "" : "s"}`;
}

// The server tells with a score whether its snapshot is stale.
function ageOf(bundle) {
  if (stale.has(bundle.id)) return "The snapshot is older than the server's --max-age: answers say stale_snapshot.";
  if (ageInDays(bundle) <= OLD_DAYS) return "";
  return `What users did in the last ${daysAgo(bundle)} is not in it. Scores are called stale only beyond --max-age, where that is set.`;
}

by("look").addEventListener("click", () =>
  attempt("release-problem", async () => {
    await ask("/v1/release/reload", "");
    setTimeout(poll, 300);
  }),
);

// Prometheus text: [name, labels, value] of each sample.
function* read(exposition) {
  for (const [, name, labels, value] of exposition.matchAll(/^(\w+)(?:\{(.*)\})? (\S+)/gm)) {
    const pairs = [...(labels ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)];
    yield [name, Object.fromEntries(pairs.map(([, label, text]) => [label, text])), Number(value)];
  }
}

function sampleOf(exposition) {
  const counts = new Map();
  const found = { at: performance.now(), atWork: 0, counts };
  for (const [name, labels, value] of read(exposition)) {
    if (name === "encode_request_seconds_bucket" && SCORING.has(labels.route)) {
      const edge = labels.le === "+Inf" ? Infinity : Number(labels.le);
      counts.set(edge, (counts.get(edge) ?? 0) + value);
    } else if (name === "encode_requests_at_work") found.atWork = value;
  }
  return found;
}

const total = (sample) => sample.counts.get(Infinity) ?? 0;

// As Prometheus's histogram_quantile: linear within the bucket. Text in milliseconds.
function quantile(share, first, last) {
  const edges = [...last.counts.keys()].sort((a, b) => a - b);
  const counts = edges.map((edge) => last.counts.get(edge) - (first.counts.get(edge) ?? 0));
  const wanted = share * counts.at(-1);
  const place = counts.findIndex((count) => count >= wanted);
  const [low, below] = place > 0 ? [edges[place - 1], counts[place - 1]] : [0, 0];
  if (edges[place] === Infinity) return `> ${1000 * low} ms`;
  return `${(1000 * (low + ((edges[place] - low) * (wanted - below)) / (counts[place] - below))).toFixed(1)} ms`;
}

function showLoad(exposition) {
  if (exposition === undefined) {
    samples = [];
    if (locked || goneSince) {
      describe(by("now"), []);
      by("load").replaceChildren();
      say("window", "");
      say("load-legend", "");
    }
    return;
  }
  const last = sampleOf(exposition);
  if (samples.length && total(last) < total(samples.at(-1))) samples = []; // another process answers now
  samples = [...samples.filter((one) => last.at - one.at <= WINDOW_MS), last];
  const first = samples[0];
  const seconds = (last.at - first.at) / 1000;
  const requests = total(last) - total(first);
  describe(by("now"), [
    ["requests/s", seconds ? (requests / seconds).toFixed(1) : "…"],
    ["p50 latency", requests ? quantile(0.5, first, last) : "…"],
    ["p99 latency", requests ? quantile(0.99, first, last) : "…"],
    ["in flight", String(last.atWork)],
  ]);
  say("window", `scoring requests, last ${Math.round(seconds)} s`);
  showBars(samples.slice(1).map((one, i) => (1000 * (total(one) - total(samples[i]))) / (one.at - samples[i].at)));
}

function showBars(rates) {
  const most = Math.max(...rates, 1);
  const room = WINDOW_MS / POLL_MS;
  const rects = rates.slice(-room).map((rate, i) => {
    const height = (36 * rate) / most;
    return svg("rect", { x: 10 * (i + room - Math.min(rates.length, room)), y: 36 - height, width: 8, height });
  });
  by("load").setAttribute("viewBox", `0 0 ${10 * room} 36`);
  const legend = `requests/s, a bar each ${POLL_MS / 1000} s; highest ${Math.max(...rates, 0).toFixed(1)}`;
  by("load").setAttribute("aria-label", legend);
  say("load-legend", legend);
  by("load").replaceChildren(...rects);
}

// --- interests -------------------------------------------------------------------------------------------------

const names = new Map(); // of the items met so far, by id
let shown = null; // the newest answer about a user's interests
let lookUps = 0;

const nameOf = (id) => names.get(String(id)) ?? `item ${id}`;

function userId() {
  const ids = idsIn(by("user-id").value);
  if (ids.length !== 1) throw new Refused(422, "Give one user id: a whole number from 1 on.");
  return ids[0];
}

async function lookUp(user, item) {
  const mine = ++lookUps;
  let answer = null;
  try {
    answer = await ask(`/v1/users/${user}/interests${item ? `?item_id=${item}` : ""}`);
  } catch (error) {
    if (mine !== lookUps) return;
    showInterests(null);
    if (error.status !== 404) throw error;
    throw new Refused(404, `Unknown: ${error.message}. Items are scored without a history.`);
  }
  if (mine === lookUps) showInterests(answer);
}

function showInterests(answer) {
  shown = answer;
  by("picture").hidden = by("fill").disabled = !answer;
  say("source", answer ? `user ${answer.user_id}, behaviors before ${answer.bundle.as_of}, bundle ${answer.bundle.id}` : "");
  markChosen();
  if (!answer) return;
  const { interests, item_id: item, attention_to_itself: itself, unknown_item: unknown } = answer;
  for (const one of interests.flatMap((interest) => interest.top_items)) {
    if (one.name) names.set(String(one.item_id), one.name);
  }
  drawBubbles(interests, itself);
  say(
    "legend",
    `${interests.length} interests; area: share of the user's behaviors.` +
      (item ? ` Orange: attention of ${nameOf(item)}${unknown ? ", which is unknown to the model" : ""}.` : ""),
  );
  listInterests(interests, item && itself);
}

// Largest first; where an item is asked about, by its attention. The circles keep their numbers.
function listInterests(interests, itself) {
  const most = Math.max(...interests.flatMap((one) => [one.weight, one.attention ?? 0]), itself ?? 0);
  const rows = interests.map((one, place) => [one.attention ?? one.weight, interestRow(one, place, most)]);
  if (itself !== undefined) rows.push([itself, itselfRow(itself, most)]);
  const ordered = rows.sort((a, b) => b[0] - a[0]).map(([, row]) => row);
  const listed = MOST_LISTED + (itself !== undefined);
  for (const row of ordered.slice(listed)) row.hidden = true;
  by("interests").replaceChildren(...ordered);
  by("more").hidden = ordered.length <= listed;
  say("more", `Show all ${interests.length}`);
}

by("more").addEventListener("click", () => {
  for (const row of by("interests").children) row.hidden = false;
  by("more").hidden = true;
});

function interestRow({ weight, size, newest, attention, categories, top_items: tops }, place, most) {
  const named = (one) => [nameOf(one.item_id), html("span", { class: "id" }, one.name ? ` ${one.item_id}` : "")];
  const bars = [bar(weight / most, `${percent(weight)} of behaviors`)];
  if (attention !== undefined) bars.push(bar(attention / most, `${percent(attention)} of attention`, "attention"));
  const facts = `newest ${day(newest)} · ${size.toLocaleString("en")} behaviors`;
  const summary = html(
    "summary",
    {},
    html("span", { class: `badge hue${place % 8}` }, String(place + 1)),
    html("div", {}, html("div", { class: "name" }, nameOf(tops[0].item_id)), html("div", { class: "id" }, facts), ...bars),
  );
  const items = html("ul", {}, ...tops.map((one) => html("li", {}, ...named(one))));
  const known = categories.length ? `categories ${categories.join(", ")}` : "of no known category";
  return html("li", {}, html("details", {}, summary, items, html("p", { class: "id" }, known)));
}

function itselfRow(itself, most) {
  const text = [html("div", { class: "name" }, "The item itself"), html("div", { class: "id" }, "the user's own past with it")];
  const bars = bar(itself / most, `${percent(itself)} of attention`, "attention");
  return html("li", { class: "itself" }, html("span", { class: "badge self" }, "="), html("div", {}, ...text, bars));
}

// Each circle, largest first, goes to the free place that a spiral from the middle meets first.
function pack(radii) {
  const placed = [];
  for (const radius of radii) {
    for (let step = 0; ; step++) {
      const [turned, away] = [0.35 * Math.sqrt(step) * 4, 2.2 * Math.sqrt(step)];
      const [x, y] = [away * Math.cos(turned), away * Math.sin(turned)];
      if (placed.every((one) => Math.hypot(one.x - x, one.y - y) >= one.radius + radius + 4)) {
        placed.push({ x, y, radius });
        break;
      }
    }
  }
  return placed;
}

function drawBubbles(interests, itself = 0) {
  const radius = (share) => Math.max(150 * Math.sqrt(share), 4);
  const circles = pack([...interests.map((one) => radius(one.weight)), ...(itself ? [radius(itself)] : [])]);
  const most = Math.max(...interests.map((one) => one.attention ?? 0), itself);
  const drawn = circles.map((circle, place) => bubble(circle, interests[place], place, most));
  const [left, right] = [Math.min(...circles.map((c) => c.x - c.radius)), Math.max(...circles.map((c) => c.x + c.radius))];
  const [top, bottom] = [Math.min(...circles.map((c) => c.y - c.radius)), Math.max(...circles.map((c) => c.y + c.radius))];
  const picture = by("bubbles");
  picture.setAttribute("viewBox", [left - 6, top - 6, right - left + 12, bottom - top + 12].map(Math.round).join(" "));
  picture.setAttribute("aria-label", `${interests.length} interests as circles, the largest ${percent(interests[0].weight)}; listed beside`);
  picture.replaceChildren(...drawn);
}

function bubble({ x, y, radius: r }, interest, place, most) {
  const text = (dy, kind, content) => svg("text", { x, y: y + dy, class: kind }, content);
  const at = { cx: x, cy: y, r };
  if (!interest) return svg("g", {}, svg("title", {}, "the item itself"), svg("circle", { ...at, class: "itself" }), text(4, "share", "="));
  const name = nameOf(interest.top_items[0].item_id);
  const drawn = svg("g", {}, svg("title", {}, name), svg("circle", { ...at, class: `bubble hue${place % 8}` }));
  if (interest.attention > 0.005) {
    drawn.append(svg("circle", { ...at, r: r + 1, class: "ring", "stroke-width": Math.max((8 * interest.attention) / most, 1) }));
  }
  const letters = Math.floor((2 * r - 8) / 8);
  if (r > 26) drawn.append(text(-4, "share", `${place + 1}`), text(12, "", name.length > letters ? `${name.slice(0, letters - 1)}…` : name));
  else if (r > 8) drawn.append(text(4, "share", `${place + 1}`));
  return drawn;
}

by("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt("user-problem", async () => {
    const user = userId();
    clearScores();
    await lookUp(user);
  });
});

// --- scores ----------------------------------------------------------------------------------------------------

function probability(value) {
  if (value > 0.9999) return "> 0.9999";
  return value >= 0.001 || value === 0 ? value.toFixed(4) : value.toExponential(1);
}

function clearScores() {
  by("scores").hidden = true;
  say("assumed", "");
  say("score-problem", "");
}

async function score(user, items) {
  // By hand, since ids may be longer than a number here.
  const answer = await ask("/v1/score", `{"user_id": ${user}, "item_ids": [${items.join(", ")}]}`);
  const { unknown_user, unknown_items, stale_snapshot } = answer.fallbacks;
  const unknown = new Set(unknown_items.map(String));
  const assumed = [
    unknown_user && "The user is unknown: scored without a history.",
    unknown.size && `Unknown items, scored as average new ones: ${[...unknown].join(", ")}.`,
    stale_snapshot && `The snapshot, of behaviors before ${answer.bundle.as_of}, is older than allowed.`,
  ];
  say("assumed", assumed.filter(Boolean).join(" "));
  if (stale_snapshot && !stale.has(answer.bundle.id)) {
    stale.add(answer.bundle.id);
    poll();
  }
  const scored = items.map((id, i) => ({ id, value: answer.probabilities[i] })).sort((a, b) => b.value - a.value);
  by("scores").tBodies[0].replaceChildren(...scored.map((one) => scoreRow(user, one, scored[0].value, unknown_user)));
  by("scores").hidden = false;
  markChosen();
}

function scoreRow(user, { id, value }, most, noHistory) {
  const name = names.get(id);
  const why = html("button", { type: "button", class: "quiet small", "data-item": id, "aria-label": `Why ${nameOf(id)}` }, "Why");
  why.disabled = noHistory;
  why.addEventListener("click", () => attempt("user-problem", () => lookUp(user, id)));
  return html(
    "tr",
    {},
    html("td", {}, nameOf(id), html("span", { class: "id" }, name ? ` ${id}` : ""), bar(value / most, probability(value))),
    html("td", {}, why),
  );
}

function markChosen() {
  for (const button of by("scores").querySelectorAll("button")) {
    const chosen = shown?.item_id !== undefined && String(shown.item_id) === button.dataset.item;
    button.setAttribute("aria-pressed", chosen);
    button.closest("tr").className = chosen ? "chosen" : "";
  }
}

by("score-form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt("score-problem", async () => {
    const items = idsIn(by("items").value);
    if (!items.length) throw new Refused(422, "Give at least one item id.");
    await score(userId(), items);
  });
});

by("fill").addEventListener("click", () => {
  const tops = shown.interests.map((interest) => interest.top_items.map((one) => String(one.item_id)));
  const best = [0, 1, 2, 3, 4].flatMap((rank) => tops.map((items) => items[rank])).filter(Boolean);
  by("items").value = [...new Set(best)].slice(0, MOST_FILLED_IN).join(", ");
});

// --- API -------------------------------------------------------------------------------------------------------

by("api").addEventListener("toggle", () => {
  if (!by("api").open) return;
  attempt("api-problem", async () => {
    const { paths } = await ask("/openapi.json");
    const rows = Object.entries(paths).flatMap(([path, actions]) =>
      Object.entries(actions).map(([method, action]) =>
        html("li", {}, html("code", {}, `${method.toUpperCase()} ${path}`), ` ${action.description ?? ""}`),
      ),
    );
    by("routes").replaceChildren(...rows);
  });
});

by("save").addEventListener("click", () =>
  attempt("api-problem", async () => {
    const described = new Blob([JSON.stringify(await ask("/openapi.json"), null, 2)], { type: "application/json" });
    const link = html("a", { href: URL.createObjectURL(described), download: "openapi.json" });
    link.click();
    URL.revokeObjectURL(link.href);
  }),
);

document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();

export { quantile, sampleOf };
