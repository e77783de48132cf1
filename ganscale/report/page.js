"use strict";
// Draws the curves of this page with Plotly, each when it scrolls into view, and moves through the
// samples. Drawings depend only on `state`; names from runs are text, never markup.

const SMOOTHINGS = [0, 0.01, 0.02, 0.05, 0.1, 0.2]; // time constants, as shares of the run
const FIRST_FIFTH = 0.2; // left out if the y axis fits the late part
const DENSE = 300; // lines with more points are drawn thin, and smoothed from the start
const COLOURS = 6;
const DASHES = ["solid", "dash", "dot"];

const state = { smoothing: 0, y: "all", range: null, hidden: new Set(), emphasized: null, version: 0 };
const report = { data: null, state, charts: [], drawAll }; // for the browser's console
window.ganscaleReport = report;

async function decompress(id) {
  const compressed = atob(document.getElementById(id).textContent);
  const bytes = Uint8Array.from(compressed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function runScript(source) {
  const script = document.createElement("script");
  script.nonce = document.querySelector("script[nonce]").nonce;
  script.textContent = source;
  document.head.append(script);
}

// ---- colours from the style sheet, for a light or a dark page

const probe = document.createElement("i");
probe.hidden = true;
document.body.append(probe);

function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

let theme = {};
function readTheme() {
  const names = ["text", "muted", "grid", "edge", "card", "error"];
  theme = Object.fromEntries(names.map((name) => [name, colour(name)]));
  theme.lines = Array.from({ length: COLOURS }, (_, number) => colour(`c${number}`));
  theme.font = getComputedStyle(document.body).fontFamily;
}

// ---- one chart

const isSeveral = () => report.data.runs.length > 1;
const allLines = () => report.data.sections.flatMap((section) => section.charts.flatMap((chart) => chart.lines));
const asText = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** The mean of past values weighted by exp(-distance / constant), whether rows are dense or sparse. */
function smoothed(x, y, constant) {
  let sum = 0, weight = 0, previous = null;
  return y.map((value, i) => {
    if (value === null) return null;
    const decay = previous === null ? 0 : Math.exp(-(x[i] - previous) / constant);
    previous = x[i];
    sum = decay * sum + value;
    weight = decay * weight + 1;
    return sum / weight;
  });
}

function shownLines(chart) {
  return chart.lines
    .map((line, number) => ({ ...line, number: isSeveral() ? line.run : number }))
    .filter((line) => !state.hidden.has(line.run));
}

function traces(chart) {
  const drawn = [];
  const span = wholeRange()[1] - wholeRange()[0] || 1;
  for (const line of shownLines(chart)) {
    const name = asText(isSeveral() ? report.data.runs[line.run].name : line.label || chart.title);
    const style = {
      color: theme.lines[line.number % chart.colours],
      dash: DASHES[Math.floor(line.number / chart.colours) % DASHES.length],
    };
    const isFaded = state.emphasized !== null && state.emphasized !== line.run;
    const isFaint = state.smoothing > 0;
    const hasMarkers = line.rows <= 30 || line.nonfinite_rows > 0;
    drawn.push({
      x: line.x, y: line.y, name, type: "scatter", meta: line.name,
      mode: hasMarkers ? "lines+markers" : "lines", marker: { size: 4, color: style.color },
      line: { ...style, width: isFaint || line.x.length > DENSE ? 1 : 1.75 },
      opacity: isFaded ? 0.12 : isFaint ? 0.4 : 1,
      hovertemplate: "%{y:.10~g}",
    });
    if (isFaint) {
      const x = line.mean_x ?? line.x;
      const y = smoothed(x, line.mean_y ?? line.y, SMOOTHINGS[state.smoothing] * span);
      drawn.push({
        x, y, name: `${name}, smoothed`, type: "scatter", mode: "lines", hoverinfo: "skip",
        line: { ...style, width: 2.25 }, opacity: isFaded ? 0.12 : 1,
      });
    }
    if (line.nonfinite.length) {
      drawn.push({
        x: line.nonfinite.map((point) => point[0]), y: line.nonfinite.map(() => 0.97), yaxis: "y2",
        name, type: "scatter", mode: "markers", text: line.nonfinite.map((point) => point[1]),
        marker: { symbol: "x-thin", size: 8, line: { width: 2, color: theme.error } },
        hovertemplate: "%{text}",
      });
    }
  }
  return drawn;
}

function wholeRange() {
  report.whole ??= (() => {
    let low = Infinity, high = -Infinity;
    for (const line of allLines()) {
      low = Math.min(low, line.x[0]);
      high = Math.max(high, line.x[line.x.length - 1]);
    }
    return low < Infinity ? [Math.min(0, low), high] : [0, 1];
  })();
  return report.whole;
}

/** The range of the y axis, which fits the visible part of the unsmoothed lines. */
function yRange(chart, isLog) {
  let [from, to] = state.range ?? wholeRange();
  let low = Infinity, high = -Infinity;
  for (const line of shownLines(chart)) {
    const start = line.x[0] + FIRST_FIFTH * (line.x[line.x.length - 1] - line.x[0]);
    const first = state.y === "late" ? Math.max(from, start) : from;
    line.y.forEach((value, i) => {
      if (value === null || line.x[i] < first || line.x[i] > to) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    });
  }
  if (low > high) return isLog ? [-1, 1] : [0, 1];
  if (isLog) [low, high] = [Math.log10(low), Math.log10(high)];
  if (low === 0 && high === 0) return isLog ? [-1, 1] : [-0.06, 1.06];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low - margin, high + margin];
}

function layout(chart, element) {
  const isLog = state.y === "log" &&
    shownLines(chart).every((line) => line.y.every((value) => value === null || value > 0));
  const isCoarse = matchMedia("(pointer: coarse)").matches; // a finger scrolls the page
  const restarts = isSeveral() ? [] : report.data.runs[0].restarts;
  const axis = { gridcolor: theme.grid, linecolor: theme.edge, zeroline: false, ticks: "" };
  return {
    width: element.clientWidth, height: element.clientHeight,
    margin: { l: 54, r: 12, t: 8, b: 28 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: theme.font, size: 11.5, color: theme.muted },
    showlegend: false, dragmode: isCoarse ? false : "zoom",
    hovermode: "x unified", hoverdistance: 40,
    hoverlabel: {
      bgcolor: theme.card, bordercolor: theme.edge, namelength: 28,
      font: { family: theme.font, size: 12, color: theme.text },
    },
    xaxis: {
      ...axis, range: state.range ?? wholeRange(), nticks: 6,
      showspikes: true, spikemode: "across", spikesnap: "hovered data", spikedash: "solid",
      spikethickness: 1, spikecolor: theme.muted, tickformat: "~s", hoverformat: ",d",
      unifiedhovertitle: { text: "%{x:,d} images" },
    },
    yaxis: {
      ...axis, type: isLog ? "log" : "linear", range: yRange(chart, isLog), nticks: 6,
      fixedrange: true, zeroline: !isLog, zerolinecolor: theme.edge,
      exponentformat: "e", minexponent: 5,
    },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    shapes: restarts.map((at) => ({
      type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", layer: "below",
      line: { color: theme.muted, width: 1, dash: "dot" },
    })),
  };
}

function draw(chart) {
  if (chart.drawn === state.version) return;
  chart.drawn = state.version;
  const options = { displayModeBar: false, doubleClick: false, showTips: false };
  Plotly.react(chart.element, traces(chart.content), layout(chart.content, chart.element), options);
  if (!chart.hasListeners) {
    chart.hasListeners = true;
    chart.element.on("plotly_relayout", (change) => {
      if (change["xaxis.range[0]"] === undefined) return;
      update({ range: [change["xaxis.range[0]"], change["xaxis.range[1]"]] });
    });
    chart.element.on("plotly_doubleclick", () => update({ range: null }));
  }
}

// ---- all charts

const visible = new Set();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = entry.target.chart;
    if (entry.isIntersecting) {
      visible.add(chart);
      draw(chart);
    } else {
      visible.delete(chart);
    }
  }
}, { rootMargin: "400px" });

let isScheduled = false;
function update(changes) {
  Object.assign(state, changes);
  state.version += 1;
  const whole = document.getElementById("whole");
  if (whole) whole.hidden = state.range === null;
  if (isScheduled) return;
  isScheduled = true; // once a frame, however fast a slider moves
  requestAnimationFrame(() => {
    isScheduled = false;
    visible.forEach(draw);
  });
}

function drawAll() {
  report.charts.forEach(draw);
}

function addListeners() {
  const smoothing = document.getElementById("smoothing");
  const smooth = () => {
    const share = SMOOTHINGS[smoothing.value];
    document.getElementById("smoothing-value").value = share ? `${Math.round(share * 100)} %` : "none";
    update({ smoothing: Number(smoothing.value) });
  };
  smoothing?.addEventListener("input", smooth);
  if (smoothing && allLines().some((line) => line.x.length > DENSE)) {
    smoothing.value = 1;
    smooth();
  }
  for (const choice of document.querySelectorAll("input[name=y]"))
    choice.addEventListener("change", () => update({ y: choice.value }));
  document.getElementById("whole")?.addEventListener("click", () => update({ range: null }));
  for (const chip of document.querySelectorAll(".chip")) {
    const run = Number(chip.dataset.run);
    chip.addEventListener("click", () => {
      const isHidden = !state.hidden.delete(run);
      if (isHidden) state.hidden.add(run);
      chip.setAttribute("aria-pressed", String(!isHidden));
      for (const figure of document.querySelectorAll(`figure[data-run="${run}"]`))
        figure.hidden = isHidden;
      update({ emphasized: null });
    });
    chip.addEventListener("pointerenter", (event) => {
      if (event.pointerType === "mouse" && !state.hidden.has(run)) update({ emphasized: run });
    });
    chip.addEventListener("pointerleave", () => {
      if (state.emphasized !== null) update({ emphasized: null });
    });
  }
  for (const button of document.querySelectorAll(".widen"))
    button.addEventListener("click", () => button.closest(".card").classList.toggle("wide"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readTheme();
    update({});
  });
  window.addEventListener("beforeprint", drawAll);
}

async function drawCurves() {
  report.data = JSON.parse(await decompress("data"));
  runScript(await decompress("plotly"));
  readTheme();
  const resized = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const chart = entry.target.chart;
      if (chart.width === entry.contentRect.width && chart.height === entry.contentRect.height) continue;
      [chart.width, chart.height] = [entry.contentRect.width, entry.contentRect.height];
      chart.drawn = null;
      if (visible.has(chart)) draw(chart);
    }
  });
  for (const card of document.querySelectorAll(".card")) {
    const content = report.data.sections[card.dataset.section].charts[card.dataset.chart];
    const element = card.querySelector(".plot");
    element.chart = { content, element, drawn: null };
    report.charts.push(element.chart);
    observer.observe(element);
    resized.observe(element);
  }
  addListeners();
  document.body.dataset.ready = "";
}

// ---- samples

function showSamples(time) {
  for (const figure of document.querySelectorAll("figure")) {
    const images = [...figure.querySelectorAll("img[data-at]")];
    if (!images.length) continue;
    const past = images.filter((image) => Number(image.dataset.at) <= time);
    const shown = past[past.length - 1] ?? images[0];
    for (const image of images) image.hidden = image !== shown;
    const at = Number(shown.dataset.at).toLocaleString("en");
    figure.querySelector(".at").textContent = `at ${at} images`;
  }
}

function moveThroughSamples() {
  const slider = document.getElementById("time");
  if (!slider) return showSamples(Infinity);
  const times = slider.dataset.times.split(",").map(Number);
  const play = document.getElementById("play");
  let timer = null;
  const show = () => {
    document.getElementById("time-value").value = `${times[slider.value].toLocaleString("en")} images`;
    showSamples(times[slider.value]);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶";
  };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    play.textContent = "❚❚";
    if (Number(slider.value) === times.length - 1) slider.value = 0;
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === times.length - 1) stop();
    }, 350);
  });
  show();
}

moveThroughSamples();
drawCurves().catch((error) => {
  const notice = document.getElementById("error");
  notice.textContent = `The curves cannot be drawn (${error}): they need a browser from 2024 or later.`;
  notice.hidden = false;
  console.error(error);
});
