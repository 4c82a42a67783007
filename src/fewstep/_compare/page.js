"use strict";
(() => {
  const { measures: MEASURES, models: MODELS } = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const COLOURS = 6;

  // What a column is; text columns sort as text, the others by their value.
  const COLUMNS = [
    { key: "method", name: "Method", text: true, what: "A solver, or a recipe (a plan that was searched or learned for this model)." },
    { key: "standing", name: "Best", text: true, what: "best: the smallest median error at this number of evaluations. tied: the interval of its ratio contains 1." },
    { key: "nfe", name: "NFE", what: "Network evaluations that every sample took." },
    { key: "median", name: "Median", what: "Median over samples of the error: the root mean square over the elements of the distance to the converged sample of the same model from the same noise, in units of the samples." },
    { key: "ratio", name: "Ratio", what: "Median over samples of the error over that of the best method at the same number of evaluations." },
    { key: "rms", name: "RMS", what: "Root mean square over samples of the error; dominated by samples that end elsewhere." },
    { key: "p90", name: "90 %", what: "The error that nine of ten samples are below." },
    { key: "frechet", name: "Fréchet", what: "Squared Fréchet distance of features to converged samples from other noises. May come out below 0 by chance." },
    { key: "sliced", name: "Sliced W.", what: "Sliced Wasserstein distance of the samples to converged ones from other noises. 0 where it cannot be told from chance." },
    { key: "data", name: "To data", what: "Squared Fréchet distance of features to features of real data; converged samples have one too." },
    { key: "grid", name: "Grid", text: true, what: "Placement of the times; of a recipe what its plan says." },
    { key: "final", name: "Ends", text: true, what: "zero: the last step goes to sigma = 0; min: to the smallest sigma of the model." },
    { key: "kind", name: "Kind", text: true },
  ];
  const LABELS = { median: "median", rms: "RMS", p90: "90 %", ratio: "ratio to best", frechet: "Fréchet", sliced: "sliced W.", data: "Fréchet to data" };

  const state = { model: 0, measure: "median", nfe: "", kind: "", show: "all", text: "", method: null, sort: "median", down: false };
  const model = () => MODELS[state.model];
  const slots = new Map(); // method to the number of its colour

  // Names go in as text nodes: none can become markup.
  function build(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }
  const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) =>
    build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // Numbers. An estimate is {value, low, high}; a value of null is one that is not finite.

  function number(value) {
    if (value === null) return "∞";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const far = size < 1e-4 || size >= 1e4;
    const text = far ? value.toExponential(2) : size >= 1000 ? value.toFixed(0) : value.toPrecision(3);
    return text.replaceAll("-", "−").replace("+", "");
  }
  const between = (e) => `${number(e.low)} to ${number(e.high)}`;
  const withInterval = (e) => (e.value === null ? "not finite" : `${number(e.value)} (${between(e)})`);
  const has = (key) => model().lines.some((line) => line[key] !== null);

  function cellOf(line, key) {
    if (key === "standing") return line.best ? "best" : line.tied ? "tied" : "";
    const value = line[key];
    if (value === null || typeof value !== "object") return value;
    return value.value === null ? Infinity : value.value;
  }

  // What is shown

  function fits(line) {
    const words = state.text.toLowerCase().split(/\s+/);
    const name = `${line.method} ${line.grid} ${line.final}`.toLowerCase();
    return (!state.kind || line.kind === state.kind)
      && (state.show === "all" || line.best || (state.show === "tied" && line.tied))
      && words.every((word) => name.includes(word));
  }

  function rows() {
    const { sort, down } = state;
    const text = COLUMNS.find((c) => c.key === sort).text;
    const order = (a, b) => {
      const [x, y] = [cellOf(a, sort), cellOf(b, sort)];
      if (x === null || y === null || x === "" || y === "") { // what is not there comes last, both ways
        return (x === null || x === "") - (y === null || y === "");
      }
      const sign = text ? x.localeCompare(y, "en", { numeric: true }) : x === y ? 0 : x < y ? -1 : 1;
      return down ? -sign : sign;
    };
    return model().lines.filter((line) => fits(line) && (state.nfe === "" || line.nfe === state.nfe)).sort(order);
  }

  // The table

  function drawHead() {
    const cells = COLUMNS.filter((c) => has(c.key) || c.key === "standing").map((c) => {
      const button = html("button", { type: "button", title: c.what ?? null }, c.name);
      button.addEventListener("click", () => {
        state.down = state.sort === c.key && !state.down;
        state.sort = c.key;
        drawTable();
        if (state.nfe !== "") drawSamples(); // rows of samples follow those of the table
      });
      return html("th", { scope: "col", "data-key": c.key, class: c.text ? null : "n" }, button);
    });
    document.querySelector("#table thead").replaceChildren(html("tr", {}, ...cells));
    byId("columns").replaceChildren(...COLUMNS.filter((c) => c.what && (has(c.key) || c.key === "standing"))
      .flatMap((c) => [html("dt", {}, c.name), html("dd", {}, c.what)]),
      html("dt", {}, "a to b"), html("dd", {}, "95 % confidence interval."));
  }

  function drawTable() {
    const shown = rows();
    const columns = COLUMNS.filter((c) => has(c.key) || c.key === "standing");
    for (const th of document.querySelectorAll("#table th")) {
      const sorted = th.dataset.key === state.sort;
      th.setAttribute("aria-sort", !sorted ? "none" : state.down ? "descending" : "ascending");
      th.classList.toggle("measure", th.dataset.key === state.measure);
    }
    const places = new Map(columns.map((c) => [c.key, Math.max(0, ...shown.map((line) => decimals(line[c.key])))]));
    document.querySelector("#table tbody").replaceChildren(...shown.map((line) =>
      html("tr", { "data-method": line.method }, ...columns.map((c) => cell(line, c, places.get(c.key))))));
    byId("none").hidden = shown.length > 0;
    const where = state.nfe === "" ? "all numbers of evaluations" : `${state.nfe} evaluations`;
    byId("table-title").textContent = `${model().model}: ${shown.length} of ${model().lines.length} runs, ${where}`;
    mark();
  }

  const decimals = (e) => (e?.value === undefined ? 0 : (number(e.value).split("e")[0].split(".")[1] ?? "").length);

  function cell(line, column, places) {
    const { key } = column;
    const value = line[key];
    if (key === "method") return html("td", { class: "name" }, methodButton(line.method));
    if (key === "standing") {
      const standing = cellOf(line, key);
      return html("td", {}, standing ? html("span", { class: `badge ${standing}` }, standing) : "");
    }
    if (column.text) return html("td", {}, value ?? "");
    if (value === null) return html("td", { class: "n" }, "–");
    if (typeof value === "number") return html("td", { class: "n" }, String(value));
    // Figure spaces, as wide as a digit, put decimal points below each other.
    const text = number(value.value) + "\u2007".repeat(places - decimals(value));
    if (key !== state.measure && key !== "ratio") return html("td", { class: "n", title: withInterval(value) }, text);
    const interval = value.value === null ? "not finite" : between(value);
    return html("td", { class: key === "ratio" ? "n ratio" : "n measure" }, text, html("small", {}, interval));
  }

  function methodButton(method) {
    const button = html("button", { type: "button", "data-method": method, "aria-pressed": "false" }, method);
    button.addEventListener("click", () => choose(method));
    return button;
  }

  // The chosen method: classes only, so that focus stays where it is

  function choose(method) {
    state.method = method === state.method ? null : method;
    if (state.nfe === "") drawSamples();
    mark();
  }

  function mark() {
    for (const node of document.querySelectorAll("[data-method]")) {
      const on = node.dataset.method === state.method;
      if (node.hasAttribute("aria-pressed")) node.setAttribute("aria-pressed", on);
      else node.classList.toggle("on", on);
      if (on && node.classList.contains("series")) byId("ring").before(node);
    }
    byId("chart").classList.toggle("chosen", document.querySelector("#chart .series.on") !== null);
  }

  // The chart: a measure against evaluations, both logarithmic

  const MARGIN = { top: 16, right: 16, bottom: 44, left: 58 };
  const SHAPES = [
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-5L5,0L0,5L-5,0z",
    "M0,-4.8L4.6,3.4H-4.6z", "M0,4.8L4.6,-3.4H-4.6z", "M-4.5,-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
  ];
  const SMALL = "M-2,0a2,2 0 1,0 4,0a2,2 0 1,0 -4,0";
  const UP = "M0,-5L5,4H-5z", DOWN = "M0,5L5,-4H-5z";
  let points = []; // {line, x, y} of every point drawn
  let near = null;

  function ticks(low, high) {
    const found = [];
    for (const steps of [[1], [1, 3], [1, 2, 5]]) {
      found.length = 0;
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
        for (const s of steps) {
          const v = Number(`${s}e${e}`);
          if (v >= low && v <= high) found.push(v);
        }
      }
      if (found.length >= 4) break;
    }
    return found;
  }
  const tickText = (v) => (v < 1e-4 || v >= 1e5 ? v.toExponential(0).replace("e+", "e").replace("-", "−") : String(v));

  function drawChart() {
    const { low, high } = model().axes[state.measure];
    const shown = new Set(model().lines.filter(fits).map((line) => line.method));
    const ranked = model().ranks[state.measure].filter((m) => shown.has(m));
    colour(ranked.slice(0, COLOURS));
    const lines = model().lines.filter((line) => shown.has(line.method) && line[state.measure] !== null);
    const nfes = [...new Set(model().lines.map((line) => line.nfe))].sort((a, b) => a - b);

    const width = Math.max(260, byId("figure").clientWidth);
    const height = Math.round(Math.min(520, Math.max(300, width * 0.5)));
    const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
    const span = Math.log(nfes.at(-1) / nfes[0]) || 1;
    const x = (nfe) => (nfes.length === 1 ? (left + right) / 2 : left + 14 + (right - left - 28) * Math.log(nfe / nfes[0]) / span);
    const inside = (v) => (v === null ? high : Math.min(Math.max(v, low), high));
    const y = (v) => bottom - (bottom - top) * Math.log(inside(v) / low) / Math.log(high / low);

    const chart = byId("chart");
    build(chart, { viewBox: `0 0 ${width} ${height}`, height }, []);
    chart.replaceChildren();
    if (state.nfe !== "") chart.append(svg("line", { class: "here", x1: x(state.nfe), x2: x(state.nfe), y1: top, y2: bottom }));
    drawFloor(chart, model().converged[state.measure], { low, left, right, bottom, y });
    for (const v of ticks(low, high)) {
      chart.append(svg("line", { class: "rule", x1: left, x2: right, y1: y(v), y2: y(v) }),
        svg("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, tickText(v)));
    }
    let free = -Infinity; // labels of the horizontal axis where there is room
    for (const nfe of nfes) {
      const half = 4 * String(nfe).length + 3;
      if (x(nfe) - half < free) continue;
      free = x(nfe) + half;
      chart.append(svg("text", { x: x(nfe), y: bottom + 18, "text-anchor": "middle" }, String(nfe)));
    }
    chart.append(svg("line", { class: "rule", x1: left, x2: right, y1: bottom, y2: bottom }),
      svg("text", { x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, "network evaluations per sample (NFE)"));

    points = [];
    near = null;
    for (const method of [...ranked].reverse()) {
      const own = lines.filter((line) => line.method === method).sort((a, b) => a.nfe - b.nfe);
      const slot = slots.get(method);
      const group = svg("g", { "data-method": method, class: `series ${own[0].kind} ${slot === undefined ? "" : `k k${slot}`}` });
      group.append(svg("path", { class: "path", d: "M" + own.map((v) => `${x(v.nfe)},${y(v[state.measure].value)}`).join("L") }));
      for (const line of own) {
        const e = line[state.measure];
        const at = { line, x: x(line.nfe), y: y(e.value) };
        points.push(at);
        const above = e.value === null || e.value > high, below = !above && e.value < low;
        const shape = above ? UP : below ? DOWN : slot === undefined ? SMALL : SHAPES[slot];
        group.append(svg("path", { class: "dot", transform: `translate(${at.x},${at.y})`, d: shape }));
        if (e.value !== null && !above) group.append(svg("line", { class: "bar", x1: at.x, x2: at.x, y1: y(e.low ?? low), y2: y(e.high) }));
      }
      chart.append(group);
    }
    chart.append(svg("circle", { id: "ring", r: 8, visibility: "hidden" }));
    drawLegend(ranked);
    byId("chart-title").textContent = `${model().model}: ${MEASURES[state.measure].toLowerCase().replace("rms", "RMS").replace("fréchet", "Fréchet").replace("wasserstein", "Wasserstein")} against evaluations`;
    hover(null);
  }

  function drawFloor(chart, floor, { low, left, right, bottom, y }) {
    if (!floor || floor.high === null || floor.high <= low) return;
    chart.append(svg("rect", { class: "floor", x: left, width: right - left, y: y(floor.high), height: y(floor.low ?? low) - y(floor.high) }));
    if (floor.value > low) chart.append(svg("line", { class: "floor-line", x1: left, x2: right, y1: y(floor.value), y2: y(floor.value) }));
    chart.append(svg("text", { x: left + 6, y: Math.min(bottom - 5, y(floor.high) + 14) }, "converged samples"));
  }

  // A method keeps its colour as long as it is among the best.
  function colour(best) {
    for (const method of [...slots.keys()]) if (!best.includes(method)) slots.delete(method);
    const free = [...Array(COLOURS).keys()].filter((k) => ![...slots.values()].includes(k));
    for (const method of best) if (!slots.has(method)) slots.set(method, free.shift());
  }

  function drawLegend(ranked) {
    byId("legend").replaceChildren(...ranked.slice(0, COLOURS).map((method) => {
      const slot = slots.get(method);
      const kind = model().lines.find((line) => line.method === method).kind;
      const button = methodButton(method);
      button.prepend(svg("svg", { viewBox: "0 0 26 12", "aria-hidden": "true", class: `series ${kind} k k${slot}` },
        svg("path", { class: "path", d: "M0,6H26" }), svg("path", { class: "dot", transform: "translate(13,6)", d: SHAPES[slot] })));
      return button;
    }));
    const grey = ranked.length - COLOURS;
    const recipes = model().lines.some((line) => line.kind === "recipe");
    byId("caption").textContent = [
      "Both axes are logarithmic; vertical bars are 95 % intervals.",
      grey > 0 ? `Grey: ${grey} other methods; point at them to see which.` : "",
      recipes ? "Dashed: recipes." : "",
      "▲ above the axis or not finite, ▼ below the axis.",
      "Click a method to highlight it here and in the table.",
    ].filter(Boolean).join(" ");
  }

  function hover(point) {
    if (near) document.querySelector("#chart .series.near")?.classList.remove("near");
    near = point;
    const tip = byId("tip"), ring = byId("ring");
    tip.hidden = !point;
    ring.setAttribute("visibility", point ? "visible" : "hidden");
    if (!point) return;
    const { line } = point;
    build(ring, { cx: point.x, cy: point.y }, []);
    [...document.querySelectorAll("#chart .series")].find((g) => g.dataset.method === line.method).classList.add("near");
    const keys = [...new Set([state.measure, "median", "ratio", "frechet", "sliced"])].filter((key) => line[key] !== null);
    const standing = cellOf(line, "standing");
    tip.replaceChildren(html("b", {}, line.method),
      `${line.grid}, ends at ${line.final}; NFE ${line.nfe}${standing && `; ${standing}`}`,
      html("table", { role: "presentation" }, html("tbody", {}, ...keys.map((key) =>
        html("tr", {}, html("td", {}, LABELS[key]), html("td", {}, withInterval(line[key])))))));
    const { offsetWidth: wide, offsetHeight: tall } = tip;
    const room = byId("figure").clientWidth;
    tip.style.left = `${Math.max(0, point.x + 14 + wide > room ? Math.min(point.x - 14 - wide, room - wide) : point.x + 14)}px`;
    tip.style.top = `${point.y > tall + 14 ? point.y - tall - 14 : point.y + 14}px`;
  }

  function nearest(event, reach = 28) {
    const box = byId("chart").getBoundingClientRect();
    const away = (p) => Math.hypot(p.x - (event.clientX - box.left), p.y - (event.clientY - box.top));
    const best = points.reduce((a, b) => (a && away(a) <= away(b) ? a : b), null);
    return best && away(best) <= reach ? best : null;
  }

  // Left and right: the same method at other evaluations; up and down: other methods here.
  function step(key) {
    const from = near ?? points.find((p) => p.line.method === state.method) ?? points.at(-1);
    if (!near || !from) return hover(from ?? null);
    const across = key === "ArrowLeft" || key === "ArrowRight";
    const row = points.filter((p) => (across ? p.line.method === from.line.method : p.line.nfe === from.line.nfe))
      .sort((a, b) => (across ? a.x - b.x : b.y - a.y));
    const next = row[row.indexOf(from) + (key === "ArrowRight" || key === "ArrowUp" ? 1 : -1)];
    if (next) hover(next);
  }

  // Samples

  function drawSamples() {
    const { pictures, strip } = model();
    const section = byId("samples-section");
    section.hidden = !strip;
    if (!strip) return;
    const found = (method, nfe) => pictures.find((p) => p[0] === method && p[1] === nfe)?.[2];
    const own = state.method ?? model().ranks[state.measure][0];
    const all = state.nfe === "";
    const shown = all
      ? model().lines.filter((line) => line.method === own).sort((a, b) => a.nfe - b.nfe)
      : rows();
    const zoom = Math.max(1, Math.floor(64 / (strip.width / strip.reduced)));
    const image = (data, name) => {
      const node = html("img", { src: `data:image/png;base64,${data}`, alt: name });
      node.addEventListener("load", () => { node.width = node.naturalWidth * zoom; });
      return node;
    };
    const cells = [];
    const first = found("converged", 0);
    if (first) cells.push(html("div", { class: "name" }, html("b", {}, "converged"), html("small", {}, "what they should be")), image(first, "converged samples"));
    for (const line of shown) {
      const data = found(line.method, line.nfe);
      if (!data) continue;
      const label = all ? html("b", {}, `NFE ${line.nfe}`) : methodButton(line.method);
      cells.push(html("div", { class: "name" }, label, html("small", {}, line.median ? `median ${number(line.median.value)}` : line.grid)),
        image(data, `samples of ${line.method} with ${line.nfe} evaluations`));
    }
    byId("samples").replaceChildren(...cells);
    byId("samples-title").textContent = all ? `Samples of ${own} at all numbers of evaluations` : `Samples at ${state.nfe} evaluations`;
    byId("samples-note").textContent = "Every column is one noise."
      + (strip.reduced > 1 ? ` Shown at 1/${strip.reduced} of their ${strip.width} x ${strip.height} pixels.` : "")
      + (all ? " Choose a number of evaluations to see all methods." : "");
  }

  // Texts

  function say(value) {
    if (value === null || value === "" || value.length === 0) return "none";
    if (Array.isArray(value)) return value.map(say).join(", ");
    if (typeof value === "object") return Object.entries(value).map(([k, v]) => `${k}: ${say(v)}`).join("; ");
    return typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
  }

  function drawTexts() {
    const { says, about, skipped } = model();
    byId("says").textContent = says.summary;
    byId("by-nfe").replaceChildren(...says.by_nfe.map((v) => html("li", {}, html("b", {}, `NFE ${v.nfe}`), html("span", {}, v.text))));
    byId("about").replaceChildren(...Object.entries(about).flatMap(([k, v]) => [html("dt", {}, k.replaceAll("_", " ")), html("dd", {}, say(v))]));
    const why = new Map(); // one line for equal reasons of a method
    for (const v of skipped) {
      const key = JSON.stringify([v.method, v.why]);
      why.set(key, { ...v, nfes: [...(why.get(key)?.nfes ?? []), v.nfe] });
    }
    byId("skipped").replaceChildren(...[...why.values()].flatMap((v) => [
      html("dt", {}, v.method), html("dd", {}, `NFE ${v.nfes.join(", ")}: ${v.why}`)]));
    byId("skipped-section").hidden = !skipped.length;
  }

  // Choices

  const options = (id, pairs, value) => {
    byId(id).replaceChildren(...pairs.map(([v, name]) => html("option", { value: v }, name)));
    byId(id).value = value;
  };

  function enter(index) {
    state.model = index;
    const { lines } = model();
    const nfes = [...new Set(lines.map((line) => line.nfe))].sort((a, b) => a - b);
    if (state.nfe !== "" && !nfes.includes(state.nfe)) state.nfe = nfes.reduce((a, b) => (Math.abs(b - 8) < Math.abs(a - 8) ? b : a));
    const keys = Object.keys(MEASURES).filter(has);
    if (!keys.includes(state.measure)) state.measure = keys[0];
    if (!has(state.sort) && state.sort !== "standing") state.sort = state.measure;
    const kinds = [...new Set(lines.map((line) => line.kind))];
    if (!kinds.includes(state.kind)) state.kind = "";
    if (!lines.some((line) => line.method === state.method)) state.method = null;
    options("measure", keys.map((key) => [key, MEASURES[key]]), state.measure);
    options("nfe", [["", "all"], ...nfes.map((n) => [n, `NFE ${n}`])], state.nfe);
    options("kind", [["", "all"], ...kinds.map((k) => [k, `${k}s`])], state.kind);
    drawHead();
    drawTexts();
    draw();
  }

  function draw() {
    drawChart();
    drawSamples();
    drawTable();
  }

  options("model", MODELS.map((m, i) => [i, m.model]), 0);
  byId("lead").textContent = `${MODELS.map((m) => m.model).join(", ")}. Every method starts from the same noises; `
    + "errors are distances to where the model's own trajectories end.";
  byId("model").addEventListener("change", (event) => enter(Number(event.target.value)));
  for (const key of ["nfe", "kind", "show", "measure"]) {
    byId(key).addEventListener("change", ({ target }) => {
      state[key] = key === "nfe" && target.value !== "" ? Number(target.value) : target.value;
      if (key === "measure") Object.assign(state, { sort: target.value, down: false });
      draw();
    });
  }
  byId("text").addEventListener("input", (event) => { state.text = event.target.value.trim(); draw(); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());

  const chart = byId("chart");
  chart.addEventListener("pointermove", (event) => hover(nearest(event)));
  chart.addEventListener("pointerleave", () => hover(null));
  chart.addEventListener("click", (event) => {
    const point = nearest(event);
    hover(point);
    if (point || state.method !== null) choose(point ? point.line.method : state.method);
  });
  chart.addEventListener("blur", () => hover(null));
  chart.addEventListener("keydown", (event) => {
    if (event.key.startsWith("Arrow")) step(event.key);
    else if (event.key === "Enter" && near) choose(near.line.method);
    else if (event.key === "Escape") hover(null);
    else return;
    event.preventDefault();
  });
  new ResizeObserver(() => drawChartOnce()).observe(byId("figure"));
  let drawn = 0;
  function drawChartOnce() {
    const width = byId("figure").clientWidth;
    if (width === drawn) return;
    drawn = width;
    drawChart();
    mark();
  }
  addEventListener("beforeprint", () => { for (const node of document.querySelectorAll("details")) node.open = true; });

  state.nfe = 8; // or the nearest there is
  enter(0);
})();
