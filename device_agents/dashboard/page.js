// The page: listens to /events, shows what came, and asks before it sends a command. Text is only ever set as text.

const $ = (id) => document.getElementById(id);
const meta = (name) => document.querySelector(`meta[name="edge-adapt-${name}"]`).content;
const SILENCE = 12 * SECOND, MOST_EVENTS = 200, FRAME_EVERY = 400;
const STATES = {
  init: "Starting", ready: "Ready", degraded: "Degraded", safe: "Safe: source only", draining: "Stopping",
  offline: "Offline",
};
const MODES = { shadow: "shadow: learns, answers from source", recommend: "recommend: asks before it changes answers",
  bounded_auto: "bounded auto: answers with what it learned" };

const curves = new History();
let now = null, latency = null, pointer = { canvas: null, x: 0 };

// ---- Words and figures

const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" :
    value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
const percent = (share, digits = 0) => share === null || share === undefined ? "–" : `${number(100 * share, digits)} %`;
const milliseconds = (value) => `${number(value, value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;

function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.floor(seconds), pad = (value) => String(value).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${pad(Math.floor(whole / 60) % 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor(whole / 3600) % 24} h`;
}

function put(id, text) {
  const place = $(id);
  if (place.textContent !== text) place.textContent = text;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Terms and figures; nothing is touched where nothing changed, so that a reader's selection and voice are left alone.
function list(id, rows) {
  const place = $(id), seen = JSON.stringify(rows);
  if (place.dataset.seen === seen) return;
  place.dataset.seen = seen;
  place.replaceChildren(...rows.flatMap(([term, text, tone]) => [element("dt", term), element("dd", text, tone)]));
}

// ---- Status

function showStatus(status) {
  now = status;
  document.title = `${status.device || "edge-adapt"}: ${STATES[status.state] ?? status.state}`;
  put("device", status.device || "edge-adapt");
  put("site", status.site ? ` · ${status.site}` : "");
  showState(status.state, STATES[status.state] ?? status.state, status.why.join(", "));
  showFacts(status);
  showAnswering(status);
  showEstimate(status.estimate);
  showLearning(status.learn, status.frozen);
  const refused = Object.entries(status.frames).filter(([, count]) => count);
  put("rate", [
    status.fps === null ? "" : `${number(status.fps, 1)} frames a second`, `${number(status.answered)} answered`,
    ...refused.map(([why, count]) => `${number(count)} ${why}`),
  ].filter(Boolean).join(" · "));
  const guards = Object.entries(status.guards).sort((one, other) => other[1] - one[1]);
  list("guards", guards.length ? guards.map(([name, count]) => [name, number(count)]) : [["None has had to act", ""]]);
  list("host", hostRows(status.host));
  list("link", linkRows(status));
  put("oddness", status.ood === null ? "\u00a0" : `${percent(status.ood)} of the latest frames are strange`);
}

function showState(state, name, why) {
  $("state").dataset.state = state;
  const [, label, reason] = $("state").children;
  if (label.textContent !== name) label.textContent = name;
  if (reason.textContent !== why) reason.textContent = why;
}

function showFacts(status) {
  const facts = [["mode", MODES[status.mode] ?? status.mode], ["up", span(status.uptime_s)], ["bundle", status.bundle],
    ["method", status.method], ["engine", status.engine]].filter(([, value]) => value);
  const rows = facts.map(([name, value]) => {
    const row = element("li", `${name} `);
    row.append(element("b", value));
    return row;
  });
  $("facts").replaceChildren(...rows);
}

const SLOTS = { source: "Source", own: "Learned here", adapter: "Adapter" };

function showAnswering(status) {
  put("slot", SLOTS[status.slot] ?? status.slot);
  put("version", [`version ${number(status.version)}`, status.route === null ? "" : `routed to ${status.route}`].filter(Boolean).join(" · "));
  put("trust", [
    status.on_probation ? "on probation: rolled back if a guard objects" : "",
    status.frozen ? "frozen: learns nothing" : "",
    status.snapshot_age_s === null ? "no snapshot yet" : `last snapshot ${span(status.snapshot_age_s)} ago`,
  ].filter(Boolean).join(" · "));
  const freeze = document.querySelector('[data-verb="freeze"]');
  freeze.textContent = status.frozen ? "Learn again" : "Freeze";
}

function showEstimate(estimate) {
  const known = estimate !== null;
  $("estimate").classList.toggle("words", !known);
  put("estimate", known ? `${number(estimate.value, 1)} %` : "Not known yet");
  put("interval", known ? `between ${number(estimate.low, 1)} and ${number(estimate.high, 1)} %` : "");
  $("estimate-track").hidden = $("estimate-ends").hidden = !known;
  if (!known) return;
  const inside = (value) => Math.min(Math.max(value, 0), 100);
  $("estimate-span").style.left = `${inside(estimate.low)}%`;
  $("estimate-span").style.width = `${inside(estimate.high) - inside(estimate.low)}%`;
  $("estimate-tick").style.left = `${inside(estimate.value)}%`;
}

function showLearning(learn, frozen) {
  const used = learn.ms_per_s, allowed = learn.allowed_ms_per_s;
  const known = used !== undefined && used !== null && allowed > 0;
  $("spent").classList.toggle("words", !known);
  put("spent", known ? `${number(used)} ms` : frozen ? "Frozen" : "Not known yet");
  put("allowed", known ? `of ${number(allowed)} ms in each second` : "");
  $("spent-track").hidden = !known;
  if (known) {
    $("spent-fill").style.width = `${Math.min(100 * used / allowed, 100)}%`;
    $("spent-fill").classList.toggle("over", used > allowed);
  }
  list("learn", [["looks", "Looks"], ["steps", "Steps"], ["waiting", "Waiting"], ["shed", "Shed for answers"]]
    .filter(([key]) => key in learn)
    .map(([key, name]) => [name, number(learn[key]), key === "shed" && learn[key] > 0 ? "bad" : ""]));
}

function hostRows(host) {
  const known = [
    ["rss_mb", "Memory", (value) => `${number(value)} MB`], ["temperature_c", "Temperature", (value) => `${number(value)} °C`],
    ["power_w", "Power", (value) => `${number(value, 1)} W`], ["threads", "Threads", number], ["fds", "Open files", number],
  ].filter(([key]) => key in host);
  return known.length ? known.map(([key, name, format]) => [name, format(host[key])]) : [["Not known yet", ""]];
}

function linkRows(status) {
  const link = { none: ["not configured", ""], online: ["online", "good"], offline: ["away", "bad"] }[status.link];
  return [
    ["MQTT broker", ...(link ?? [status.link, ""])],
    ["Waiting in the outbox", number(status.waiting)],
    ["Parts started again", number(status.restarts), status.restarts ? "bad" : ""],
  ];
}

// ---- Curves, histogram, events, frame

function showPoints(points) {
  points.forEach((point) => curves.add(point));
  draw();
}

const shown = {
  confidence: { tone: "blue", low: 0, high: 1, format: (value) => percent(value) },
  ood: { tone: "orange", format: (value) => number(value, value !== 0 && Math.abs(value) < 10 ? 1 : 0) },
};

function draw() {
  for (const [name, how] of Object.entries(shown)) {
    const at = pointer.canvas === name ? pointer.x : null;
    const read = drawCurve($(name), curves, name, { ...how, pointer: at });
    const last = curves.buckets.findLast((bucket) => bucket[name].n);
    const exact = name === "confidence" ? (value) => percent(value, 1) : (value) => number(value, 2);
    const text = read ? `${exact(read[name].mean)}, ${span((curves.end - read.ts) / SECOND)} ago`
      : last ? exact(last[name].mean) : "not known";
    put(`${name}-now`, text);
    $(name).setAttribute("aria-label", `${name === "ood" ? "OOD score" : "Confidence"} over two minutes, now ${text}`);
  }
  if (latency) showLatency();
}

function showLatency() {
  put("p50", milliseconds(latency.p50));
  put("p99", `p50, and ${milliseconds(latency.p99)} p99`);
  put("latency-note", `the latest ${number(latency.n)} answers`);
  $("latency").setAttribute("aria-label",
    `Histogram of answer latency: p50 ${milliseconds(latency.p50)}, p99 ${milliseconds(latency.p99)}`);
  drawHistogram($("latency"), latency);
}

function showEvents(events) {
  const place = $("events");
  for (const event of events) {
    if (event.severity !== "info") curves.mark(event.ts, "event");
    else if (event.kind === "drift") curves.mark(event.ts, "drift");
    const when = new Date(event.ts), row = element("li", undefined, event.severity);
    const time = element("time", Number.isNaN(when.getTime()) ? "–" : when.toLocaleTimeString("en-GB"));
    if (!Number.isNaN(when.getTime())) { time.dateTime = when.toISOString(); time.title = when.toLocaleString("en-GB"); }
    const text = element("span", event.text), facts = Object.entries(event.facts ?? {});
    if (facts.length) {
      const told = facts.map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`);
      text.append(" ", element("small", told.join(", ")));
    }
    row.append(time, element("b", event.kind), text);
    place.prepend(row);
  }
  setTimeout(() => place.setAttribute("aria-live", "polite"), SECOND);  // what was there before is not read out
  while (place.children.length > MOST_EVENTS) place.lastChild.remove();
  $("noevents").hidden = place.children.length > 0;
}

let fetching = false, wanted = false;

// The picture and the answer to it come together, and never faster than they can be fetched.
async function showFrame() {
  wanted = true;
  if (fetching || document.hidden) return;
  fetching = true;
  while (wanted && !document.hidden) {
    wanted = false;
    try { await fetchFrame(); } catch { /* the next one may come */ }
    await new Promise((done) => setTimeout(done, FRAME_EVERY));
  }
  fetching = false;
}

async function fetchFrame() {
  const answer = await fetch("/frame.png");
  if (answer.status !== 200) return;
  const [, label, confidence] = JSON.parse(answer.headers.get("edge-adapt-answer"));
  const picture = $("frame"), old = picture.src;
  picture.src = URL.createObjectURL(await answer.blob());
  await picture.decode();
  if (old) URL.revokeObjectURL(old);
  picture.classList.toggle("tiny", picture.naturalWidth < 160);
  picture.alt = `Latest frame, answered ${label}`;
  picture.hidden = false;
  $("noframe").hidden = true;
  put("label", label);
  $("label").title = label;
  put("sure", percent(confidence, 1));
}

// ---- The stream

let stream = null, heard = 0, tries = 0;

function connect() {
  stream?.close();
  stream = new EventSource("/events");
  stream.addEventListener("hello", (event) => {
    if (JSON.parse(event.data).instance !== meta("instance")) { location.reload(); return; }
    curves.buckets = []; curves.marks = []; curves.version = null;
    $("events").replaceChildren();
    tries = 0;
    alive();
  });
  stream.addEventListener("beat", alive);
  stream.addEventListener("news", (event) => { alive(); show(JSON.parse(event.data)); });
  stream.onerror = () => {
    lost();
    if (stream.readyState !== EventSource.CLOSED) return;  // the browser itself tries again
    stream.close();
    setTimeout(connect, Math.min(1000 * 2 ** tries++, 15000));
  };
}

function show(news) {
  if (news.status) showStatus(news.status);
  if (news.events) showEvents(news.events);
  if (news.latency) latency = news.latency;
  if (news.points) showPoints(news.points);
  if (news.frame) showFrame();
  buttons();
}

function alive() {
  heard = performance.now();
  if (!document.body.classList.contains("lost")) return;
  document.body.classList.remove("lost");
  $("lost").hidden = true;
  if (now) showState(now.state, STATES[now.state] ?? now.state, now.why.join(", "));
  buttons();
}

function lost() {
  if (document.body.classList.contains("lost")) return;
  document.body.classList.add("lost");
  $("lost").hidden = false;
  put("lost", "No connection to the agent. What you see is old; trying again.");
  showState("lost", "Not connected", "");
  buttons();
}

setInterval(() => { if (heard && performance.now() - heard > SILENCE) { lost(); connect(); heard = performance.now(); } }, 1000);

// ---- Commands

let running = false;

function question(verb) {
  const { frozen, version, slot } = now ?? {};
  const who = slot === "source" ? "the source" : `version ${version}`;
  return {
    snapshot: ["Take a snapshot?", "What was learned up to now is kept on disk. Answers go on meanwhile.", "Take snapshot"],
    rollback: ["Roll back?", `Now ${who} answers. The adapter before it answers instead, and this one is dropped.`, "Roll back"],
    reset: ["Reset to source?", "Everything that was learned is dropped, and the source answers from the next frame on.", "Reset"],
    freeze: frozen ? ["Learn again?", "The agent goes on learning from what it sees.", "Learn again"]
      : ["Freeze?", `The agent learns nothing until you let it. Answers stay with ${who}.`, "Freeze"],
  }[verb];
}

function buttons() {
  const off = running || document.body.classList.contains("lost") || now === null;
  for (const button of document.querySelectorAll("[data-verb]")) button.disabled = off;
}

function ask(verb) {
  const [title, text, yes] = question(verb), body = verb === "freeze" ? { on: !now.frozen } : {};
  put("ask-title", title); put("ask-text", text); put("ask-yes", yes);
  $("ask-yes").classList.toggle("danger", verb === "reset");
  $("ask-yes").onclick = () => { $("ask").close(); send(verb, body, yes); };
  $("ask").showModal();
  $("ask-no").focus();
}

async function send(verb, body, name) {
  running = true;
  buttons();
  result(`${name}: working …`);
  try {
    const answer = await fetch(`/command/${verb}`, {
      method: "POST", body: JSON.stringify(body),
      headers: { "content-type": "application/json", "x-edge-adapt-token": meta("token") },
    });
    const told = await answer.json();
    if (answer.ok) result(`${name}: done. ${sentence(told.result)}`, "good");
    else result(`${name}: refused. ${told.error}. ${told.remedy}`, "bad");
  } catch {
    result(`${name}: no answer from the agent`, "bad");
  }
  running = false;
  buttons();
}

function sentence(told) {
  return Object.entries(told ?? {}).map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
}

function result(text, tone = "") {
  $("result").className = `result ${tone}`;
  put("result", text);
}

// ---- Begin

for (const button of document.querySelectorAll("[data-verb]")) button.addEventListener("click", () => ask(button.dataset.verb));
$("ask-no").addEventListener("click", () => $("ask").close());
for (const name of Object.keys(shown)) {
  $(name).addEventListener("pointermove", (event) => { pointer = { canvas: name, x: event.offsetX }; draw(); });
  $(name).addEventListener("pointerleave", () => { pointer = { canvas: null, x: 0 }; draw(); });
}
new ResizeObserver(draw).observe(document.querySelector("main"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.addEventListener("visibilitychange", () => { if (wanted) showFrame(); });
buttons();
draw();
connect();
