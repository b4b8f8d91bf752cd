// Curves and a histogram on canvas, drawn from numbers; colours come from the style, so that dark is dark.

const SECOND = 1000, WINDOW = 120 * SECOND, BUCKET = 500, GAP = 8 * SECOND;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A canvas as large as it is shown, in pixels of the screen; returns its context and its size in CSS pixels.
function fitted(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  const wide = Math.round(width * ratio), high = Math.round(height * ratio);
  if (canvas.width !== wide || canvas.height !== high) { canvas.width = wide; canvas.height = high; }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  return { context, width, height };
}

// Answers of the last two minutes, put together in half seconds: memory stays small at any frame rate.
class History {
  constructor() { this.buckets = []; this.marks = []; this.version = null; }

  add([ts, , confidence, ood, , version]) {
    let last = this.buckets.at(-1);
    if (last && (ts < last.ts - GAP || ts > last.ts + 3600 * SECOND)) {  // the clock of the device was set
      this.buckets = []; this.marks = []; last = undefined;
    }
    if (this.version !== null && version !== this.version) this.mark(ts, "change");
    this.version = version;
    if (!last || ts >= last.ts + BUCKET) {
      last = { ts, n: 0, confidence: new Range(), ood: new Range() };
      this.buckets.push(last);
    }
    last.n += 1;
    last.confidence.add(confidence);
    last.ood.add(ood);
    const start = this.end - WINDOW - GAP;
    while (this.buckets.length && this.buckets[0].ts < start) this.buckets.shift();
    while (this.marks.length && this.marks[0].ts < start) this.marks.shift();
  }

  mark(ts, kind) { this.marks.push({ ts, kind }); if (this.marks.length > 200) this.marks.shift(); }

  get end() { return this.buckets.length ? this.buckets.at(-1).ts + BUCKET : 0; }
}

class Range {
  constructor() { this.sum = 0; this.n = 0; this.low = Infinity; this.high = -Infinity; }

  add(value) {
    if (value === null || value === undefined) return;
    this.sum += value; this.n += 1;
    this.low = Math.min(this.low, value); this.high = Math.max(this.high, value);
  }

  get mean() { return this.sum / this.n; }
}

function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => value <= step * power * 1.0001) * power;
}

// One curve: mean as a line, lowest to highest as a band behind it, marks as upright lines, the pointer as a reading.
function drawCurve(canvas, history, name, { tone, low = null, high = null, format, pointer = null }) {
  const { context, width, height } = fitted(canvas);
  const shown = history.buckets.filter((bucket) => bucket[name].n);
  const bottom = height - 16, top = 6, left = 44;
  const floor = low ?? Math.min(0, ...shown.map((bucket) => bucket[name].low));
  const ceiling = high ?? floor + niceTop(Math.max(...shown.map((bucket) => bucket[name].high), 0) - floor);
  const x = (ts) => left + (width - left) * (1 - (history.end - ts) / WINDOW);
  const y = (value) => bottom - (bottom - top) * (value - floor) / (ceiling - floor);
  drawAxes(context, { width, left, top, bottom, floor, ceiling, format, y });
  if (!shown.length) return null;
  context.save();
  context.beginPath(); context.rect(left, 0, width - left, height); context.clip();
  for (const { ts, kind } of history.marks) drawMark(context, x(ts), top, bottom, kind);
  for (const run of runs(shown)) drawRun(context, run, name, x, y, colour(tone));
  const read = pointer === null ? null : nearest(shown, x, pointer);
  if (read) {
    context.fillStyle = colour(tone);
    context.strokeStyle = colour("card"); context.lineWidth = 2;
    context.beginPath(); context.arc(x(read.ts + BUCKET / 2), y(read[name].mean), 4.5, 0, 7); context.fill(); context.stroke();
  }
  context.restore();
  return read;
}

function drawAxes(context, { width, left, top, bottom, floor, ceiling, format, y }) {
  context.strokeStyle = colour("rule"); context.fillStyle = colour("muted"); context.lineWidth = 1;
  context.textBaseline = "middle"; context.textAlign = "right";
  for (const value of [floor, (floor + ceiling) / 2, ceiling]) {
    const at = Math.round(y(value)) + .5;
    context.beginPath(); context.moveTo(left, at); context.lineTo(width, at); context.stroke();
    context.fillText(format(value), left - 7, Math.max(at, top));
  }
  context.textBaseline = "alphabetic";
  context.textAlign = "left"; context.fillText("2 min ago", left, bottom + 14);
  context.textAlign = "center"; context.fillText("1 min", left + (width - left) / 2, bottom + 14);
  context.textAlign = "right"; context.fillText("now", width, bottom + 14);
}

const MARKS = { change: { tone: "green", dash: [], short: 5 }, drift: { tone: "green", dash: [5, 3] }, event: { tone: "amber", dash: [2, 3] } };

// Another version comes with nearly every look: a short tick, or the curve would be behind a fence.
function drawMark(context, at, top, bottom, kind) {
  const { tone, dash, short } = MARKS[kind];
  context.strokeStyle = colour(tone);
  context.lineWidth = 1.5;
  context.setLineDash(dash);
  context.beginPath(); context.moveTo(at, short ? bottom - short : top); context.lineTo(at, bottom); context.stroke();
  context.setLineDash([]);
}

// Buckets without a long silence between them.
function runs(buckets) {
  const found = [];
  for (const bucket of buckets) {
    const run = found.at(-1);
    if (run && bucket.ts - run.at(-1).ts < GAP) run.push(bucket); else found.push([bucket]);
  }
  return found;
}

function drawRun(context, run, name, x, y, tone) {
  const at = (bucket) => x(bucket.ts + BUCKET / 2);
  context.fillStyle = tone; context.globalAlpha = .16;
  context.beginPath();
  for (const bucket of run) context.lineTo(at(bucket), y(bucket[name].high));
  for (const bucket of [...run].reverse()) context.lineTo(at(bucket), y(bucket[name].low));
  context.closePath(); context.fill();
  context.globalAlpha = 1; context.strokeStyle = tone; context.lineWidth = 1.75; context.lineJoin = "round";
  context.beginPath();
  if (run.length === 1) context.arc(at(run[0]), y(run[0][name].mean), 1, 0, 7);
  for (const bucket of run) context.lineTo(at(bucket), y(bucket[name].mean));
  context.stroke();
}

function nearest(buckets, x, pointer) {
  return buckets.reduce((best, bucket) =>
    Math.abs(x(bucket.ts + BUCKET / 2) - pointer) < Math.abs(x(best.ts + BUCKET / 2) - pointer) ? bucket : best);
}

function drawHistogram(canvas, { counts, top, p50, p99, above }) {
  const { context, width, height } = fitted(canvas);
  const bottom = height - 16, most = Math.max(...counts, 1), step = width / counts.length;
  context.fillStyle = colour("blue"); context.globalAlpha = .75;
  counts.forEach((count, index) => {
    const tall = count ? Math.max(2, (bottom - 4) * count / most) : 0;
    context.fillRect(index * step + .5, bottom - tall, Math.max(1, step - 1), tall);
  });
  context.globalAlpha = 1;
  context.strokeStyle = colour("rule"); context.lineWidth = 1;
  context.beginPath(); context.moveTo(0, bottom + .5); context.lineTo(width, bottom + .5); context.stroke();
  context.fillStyle = colour("muted"); context.textBaseline = "alphabetic";
  context.textAlign = "left"; context.fillText("0", 0, height - 3);
  context.textAlign = "right"; context.fillText(`${top} ms${above ? `, ${above} slower` : ""}`, width, height - 3);
  for (const [value, tone] of [[p50, "ink"], [p99, "orange"]]) {
    const at = Math.round(width * Math.min(value / top, 1)) + .5;
    context.strokeStyle = colour(tone); context.lineWidth = 1.5;
    context.beginPath(); context.moveTo(at, 0); context.lineTo(at, bottom); context.stroke();
  }
}
