"use strict";
// Draws the curves and the gallery of report.html from the JSON in #data. Plain DOM: nothing is fetched and nothing is parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);

const SERIES = ["#3d86d1", "#d9792b", "#2f9e77", "#c9558a", "#8a74d1", "#a3912a", "#5aa6b8", "#b0605a"];
// of middling lightness: they can be told apart on white and on black
const DASHES = ["", "6 3", "1.5 3"];

const template = document.createElement("template");
template.innerHTML = "<svg></svg>";
const SVG = template.content.firstChild.namespaceURI;

function element(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...(children || []));
  return node;
}
const html = (tag, attributes, ...children) => element(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => element(SVG, tag, attributes, children);

/* ---------- numbers ---------- */

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return value.toFixed(0);
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
}

const fixed = (value) => (value === null ? "–" : (value < 0 ? "−" : "") + Math.abs(value).toFixed(2));

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + step * 1e-6; i++) found.push(i * step);
  return found;
}

function range(lines) {
  // The bulk of the values and what is near it: one wild value, as of a step that compiles, would flatten all others.
  const values = lines.flatMap((line) => line.values.filter((v) => v !== null)).sort((a, b) => a - b);
  if (!values.length) return [0, 1];
  const at = (share) => values[Math.round(share * (values.length - 1))];
  const room = 1.5 * (at(0.96) - at(0.04));
  let low = Math.max(values[0], at(0.04) - room), high = Math.min(values[values.length - 1], at(0.96) + room);
  if (room === 0) [low, high] = [values[0], values[values.length - 1]];
  if (low >= 0 && (low <= high / 2 || low === high)) low = 0;
  if (low === high) [low, high] = low ? [Math.min(low * 2, 0), Math.max(high * 2, 0)] : [0, 1];
  const pad = 0.06 * (high - low);
  return [low === 0 ? 0 : low - pad, high + pad];
}

/* ---------- curves ---------- */

function chart(spec) {
  const steps = [...new Set(spec.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const marks = data.runs[0].marks.slice(1).filter(() => data.runs.length === 1);
  const hidden = new Set();
  const pen = (i) => (data.runs.length > 1 ? spec.lines[i].run : i);  // a run has one colour in all charts
  const colour = (i) => SERIES[pen(i) % SERIES.length], dash = (i) => DASHES[Math.floor(pen(i) / SERIES.length) % DASHES.length];
  const where = html("output", {}), plot = html("div", { class: "plot", tabindex: 0, role: "slider", "aria-label": spec.title });
  plot.setAttribute("aria-valuemin", 0);
  plot.setAttribute("aria-valuemax", steps.length - 1);
  const shown = spec.lines.map(() => html("b", {}));
  const keys = spec.lines.map((line, i) => html("li", {}, html("button", {
    type: "button", "aria-pressed": "true", title: "show or hide",
    onclick: (event) => {
      if (!hidden.delete(i)) hidden.add(i);
      event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(i)));
      draw();
    },
  }, svg("svg", { width: 16, height: 8, "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 16, y1: 4, y2: 4, stroke: colour(i), "stroke-width": 2.4, "stroke-dasharray": dash(i) })),
  html("span", {}, line.label), shown[i])));
  let toX = () => 0, cursor = null;

  function path(line, values, x, y) {
    let text = "", pen = "M";
    values.forEach((value, i) => {
      if (value === null) { pen = "M"; return; }
      text += `${pen}${x(line.steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    return text;
  }

  function draw() {
    const width = Math.max(plot.clientWidth, 200), height = 190, left = 44, right = 12, top = 18, bottom = 24;
    const visible = spec.lines.filter((_, i) => !hidden.has(i));
    const [low, high] = range(visible.length ? visible : spec.lines);
    // what is measured from a later stage on begins where that does
    const first = Math.min(steps[0], Math.max(0, ...marks.map((mark) => mark[1]).filter((start) => start < steps[0])));
    const last = Math.max(steps[steps.length - 1], first + 1);
    const x = (step) => left + (width - left - right) * (step - first) / (last - first);
    const y = (value) => height - bottom - (height - top - bottom) * (value - low) / (high - low);
    toX = x;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    for (const tick of ticks(low, high, 4)) {
      root.append(svg("line", { class: "rule", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
        svg("text", { x: left - 7, y: y(tick) + 3.5, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of ticks(first, last, width > 420 ? 6 : 4)) {
      root.append(svg("text", { x: x(tick), y: height - 8, "text-anchor": "middle" }, short(tick)));
    }
    for (const [stage, start] of marks) {
      if (start < first || x(start) > width - right - 8) continue;
      root.append(svg("line", { class: "mark", x1: x(start), x2: x(start), y1: top - 6, y2: height - bottom }),
        svg("text", { x: x(start) + 4, y: top - 5 }, stage));
    }
    const clip = `clip${charts.indexOf(spec)}`;
    root.append(svg("clipPath", { id: clip }, svg("rect", {
      x: left - 2, y: top - 3, width: width - left - right + 4, height: height - top - bottom + 5 })));
    const lines = svg("g", { "clip-path": `url(#${clip})` });
    spec.lines.forEach((line, i) => {
      if (hidden.has(i)) return;
      const stroke = { stroke: colour(i), "stroke-dasharray": dash(i) || null };
      const faint = line.means ? { opacity: 0.3, "stroke-width": 1 } : { "stroke-width": 1.7 };
      lines.append(svg("path", { d: path(line, line.values, x, y), ...stroke, ...faint }));
      if (line.means) lines.append(svg("path", { d: path(line, line.means, x, y), ...stroke, "stroke-width": 2 }));
      line.values.forEach((value, j) => {
        if (value === null) return;
        const at = { cx: x(line.steps[j]), cy: y(value), fill: colour(i) };
        if (line.steps.length < 12) lines.append(svg("circle", { ...at, r: 2.6 }));
        if (value > high) root.append(svg("path", { d: `M${at.cx - 3} ${top + 2}h6l-3 -5z`, style: `fill:${colour(i)}` }));
        if (value < low) root.append(svg("path", { d: `M${at.cx - 3} ${height - bottom - 2}h6l-3 5z`, style: `fill:${colour(i)}` }));
      });
    });
    root.append(lines, svg("g", { class: "cursor" }));
    plot.replaceChildren(root);
    plot.place = { x, y, top, base: height - bottom, low, high };
    tell(cursor);
  }

  function tell(index) {
    cursor = index;
    const step = steps[index === null ? steps.length - 1 : index], place = plot.place;
    const over = plot.querySelector(".cursor");
    over.replaceChildren();
    if (index !== null) over.append(svg("line", { class: "at", x1: place.x(step), x2: place.x(step), y1: place.top, y2: place.base }));
    spec.lines.forEach((line, i) => {
      // the last value at or before the step: curves are not all measured at the same ones
      let j = line.steps.length - 1;
      while (j > 0 && line.steps[j] > step) j--;
      const value = line.steps[j] <= step ? line.values[j] : null;
      shown[i].textContent = short(value);
      if (index !== null && value !== null && !hidden.has(i)) {
        const cy = place.y(Math.min(Math.max(value, place.low), place.high));
        over.append(svg("circle", { class: "dot", cx: place.x(line.steps[j]), cy, r: 4, fill: colour(i) }));
      }
    });
    where.textContent = `step ${step}`;
    plot.setAttribute("aria-valuenow", index === null ? steps.length - 1 : index);
    plot.setAttribute("aria-valuetext", `step ${step}: ` + spec.lines.map((l, i) => `${l.label} ${shown[i].textContent}`).join(", "));
  }

  function follow(event) {
    const x = event.clientX - plot.getBoundingClientRect().left;
    let best = 0;
    steps.forEach((step, i) => { if (Math.abs(toX(step) - x) < Math.abs(toX(steps[best]) - x)) best = i; });
    tell(best);
  }
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tell(null); });
  plot.addEventListener("blur", () => tell(null));
  plot.addEventListener("keydown", (event) => {
    const end = steps.length - 1, now = cursor === null ? end : cursor;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, PageDown: now - 10, PageUp: now + 10, Home: 0, End: end }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    tell(Math.min(Math.max(to, 0), end));
  });

  const card = html("div", { class: "card chart" },
    html("header", {}, html("h3", {}, spec.title), where), plot, html("ul", { class: "keys" }, ...keys));
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth !== width) { width = plot.clientWidth; draw(); }
  }).observe(plot);
  return card;
}

const charts = data.charts.filter((spec) => spec.lines.some((line) => line.steps.length));
const grid = document.getElementById("charts");
if (grid) grid.append(...charts.map(chart));

/* ---------- gallery ---------- */

const ORDERS = {
  "in order": null,
  spread: (a, b) => b.spread - a.spread,
  worst: (a, b) => a.mean - b.mean,
  best: (a, b) => b.mean - a.mean,
};

function scaleOf(samples) {
  // as rollout_pictures.reward_scale: [0, 1], or as far beyond as any reward goes, in halves; here over all steps, so that they can be compared
  let low = 0, high = 1;
  for (const sample of samples) for (const prompt of sample.prompts) for (const { reward } of prompt.completions) {
    if (reward !== null) { low = Math.min(low, reward); high = Math.max(high, reward); }
  }
  return [Math.floor(Math.round(low * 2000) / 1000) / 2, Math.ceil(Math.round(high * 2000) / 1000) / 2];
}

function colourOf(reward, [low, high]) {
  if (reward === null) return data.unscored;
  const last = data.viridis.length - 1, place = Math.min(Math.max((reward - low) / (high - low), 0), 1) * last;
  const i = Math.min(Math.floor(place), last - 1);
  return data.viridis[i].map((a, c) => Math.round(a + (data.viridis[i + 1][c] - a) * (place - i)));
}
const css = (rgb) => `rgb(${rgb.join(" ")})`;
const isDark = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b < 110;

function average(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b) / known.length : null;
}

function statistics(prompt) {
  const rewards = prompt.completions.map((c) => c.reward), mean = average(rewards);
  const squares = rewards.map((r) => (r === null ? null : (r - mean) ** 2));
  return { mean, spread: mean === null ? null : Math.sqrt(average(squares)) };
}

function arranged(prompts, order) {
  const found = prompts.map((prompt) => ({ prompt, ...statistics(prompt) }));
  const compare = ORDERS[order];
  if (!compare) return found;
  return [...found.filter((one) => one.mean !== null).sort(compare), ...found.filter((one) => one.mean === null)];
}

function distinct(completions) {
  // equal answers are one, with their number; best first
  const found = new Map();
  for (const one of completions) {
    const key = JSON.stringify([one.text, one.reward, one.parts]);
    if (found.has(key)) found.get(key).times += 1;
    else found.set(key, { ...one, times: 1 });
  }
  return [...found.values()].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
}

function raw(text) {
  const pieces = text.split(/(<(?:loc|seg)\d+>)/).filter((piece) => piece !== "");
  const spans = pieces.map((piece) => /^<(?:loc|seg)\d+>$/.test(piece) ? html("span", { class: "loc" }, piece) : piece);
  return html("span", { class: "raw" }, ...(spans.length ? spans : ["(nothing)"]));
}

function prompt({ prompt: asked, mean, spread }, scale) {
  const answers = distinct(asked.completions);
  const long = 1000 / Math.max(...asked.size), width = asked.size[0] * long, height = asked.size[1] * long;
  const view = svg("svg", { class: "view", viewBox: `0 0 ${width.toFixed(1)} ${height.toFixed(1)}`, role: "img",
    "aria-label": `${asked.prompt}: the image with the gold answer and ${asked.completions.length} sampled ones` });
  view.append(svg("image", { href: asked.image, width, height, preserveAspectRatio: "none",
    class: asked.image.startsWith("data:image/png") ? "drawing" : null }));

  const outline = (at) => {
    if (at.length === 2) {
      const [y, x] = [at[0] * height, at[1] * width], arm = 26;
      return `M${x - arm} ${y}H${x + arm}M${x} ${y - arm}V${y + arm}`;
    }
    const [y1, x1, y2, x2] = at.map((v, i) => v * (i % 2 ? width : height));
    return `M${x1} ${y1}H${x2}V${y2}H${x1}Z`;
  };
  const shapes = (of, parent, colour, halo) => {
    for (const { at } of [...of.boxes, ...of.points]) {
      parent.append(svg("path", { class: "halo", d: outline(at), stroke: halo }), svg("path", { class: "line", d: outline(at), stroke: colour }));
    }
    return parent;
  };
  const layers = answers.map((answer) => {
    const colour = colourOf(answer.reward, scale);
    return shapes(answer, svg("g", { class: "answer" }), css(colour), isDark(colour) ? "#fff" : "#000");
  });
  view.append(...[...layers].reverse(), shapes(asked.gold, svg("g", { class: "gold" })));

  const readout = html("div", { class: "readout", "aria-live": "polite", tabindex: 0, role: "region", "aria-label": "the answer pointed at" });
  let pinned = null;
  const rows = answers.map((answer, i) => html("button", {
    type: "button", "aria-pressed": "false",
    onpointerenter: (event) => { if (event.pointerType === "mouse") light(i); },
    onpointerleave: (event) => { if (event.pointerType === "mouse") light(pinned); },
    onfocus: () => light(i),
    onblur: () => light(pinned),
    onclick: () => pin(pinned === i ? null : i),
  },
  html("span", { class: "chip", style: `background:${css(colourOf(answer.reward, scale))}` }),
  html("span", { class: "reward" }, fixed(answer.reward)), raw(answer.text),
  html("span", { class: "times" }, answer.times > 1 ? `×${answer.times}` : "")));

  const chips = (pairs) => html("dl", { class: "parts" },
    ...pairs.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, fixed(value)))));
  const averages = [["reward", average(asked.completions.map((c) => c.reward))],
    ...Object.keys(asked.completions[0].parts).map((name) => [name, average(asked.completions.map((c) => c.parts[name]))])];

  function light(index) {
    view.classList.toggle("lit", index !== null);
    layers.forEach((layer, i) => layer.classList.toggle("on", i === index));
    rows.forEach((row, i) => row.classList.toggle("on", i === index));
    if (index === null) {
      const kinds = `${asked.completions.length} answers, ${answers.length} different; on average:`;
      readout.replaceChildren(html("p", { class: "soft" }, kinds), chips(averages));
      return;
    }
    const { text, reward, advantage, parts } = answers[index];
    const pairs = [["reward", reward], ...Object.entries(parts), ["advantage", advantage]];
    readout.replaceChildren(html("p", {}, raw(text)), chips(pairs));
  }

  function pin(index) {
    pinned = index;
    rows.forEach((row, i) => row.setAttribute("aria-pressed", String(i === index)));
    light(index);
  }

  function nearest(event) {
    // the outline or cross nearest to the pointer, within a finger's width; else the smallest box around it
    const box = view.getBoundingClientRect(), fit = Math.min(box.width / width, box.height / height);
    const px = event.clientX - box.left - (box.width - width * fit) / 2, py = event.clientY - box.top - (box.height - height * fit) / 2;
    let best = null, least = 14, around = null, area = Infinity;
    answers.forEach((answer, i) => {
      for (const { at } of [...answer.boxes, ...answer.points]) {
        const [y1, x1, y2, x2] = (at.length === 2 ? [...at, ...at] : at).map((v, k) => v * fit * (k % 2 ? width : height));
        const dx = Math.max(x1 - px, px - x2), dy = Math.max(y1 - py, py - y2), inside = Math.max(dx, dy);
        const distance = inside <= 0 ? -inside : Math.hypot(Math.max(dx, 0), Math.max(dy, 0));
        if (distance < least) [best, least] = [i, distance];
        if (inside <= 0 && (y2 - y1) * (x2 - x1) < area) [around, area] = [i, (y2 - y1) * (x2 - x1)];
      }
    });
    return best ?? around;
  }
  view.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse") return;
    const found = nearest(event);
    light(found ?? pinned);
    if (found !== null) reveal(rows[found]);
  });
  view.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") light(pinned); });
  view.addEventListener("click", (event) => {
    const found = nearest(event);
    pin(found === pinned ? null : found);
  });
  const list = html("ul", { class: "answers", "aria-label": "answers" }, ...rows.map((row) => html("li", {}, row)));
  function reveal(row) {
    const top = row.offsetTop - list.offsetTop;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + row.offsetHeight - list.clientHeight;
  }
  light(null);

  const about = [mean === null ? "not scored" : `mean ${fixed(mean)} · spread ${fixed(spread)}`];
  if (asked.source) about.push(`${asked.source} ${asked.index}`);
  return html("article", { class: "card prompt" },
    html("header", {}, html("h3", {}, asked.prompt), html("span", { class: "soft" }, about.join(" · "))),
    html("div", { class: "gold" }, html("span", { class: "swatch gold", title: "gold" }), raw(asked.gold.text)),
    html("div", { class: "pair" }, html("div", {}, view, readout), list));
}

function gallery(host) {
  const runs = data.runs.filter((run) => run.samples.length);
  const state = { run: 0, step: runs[0].samples.length - 1, order: "in order" };
  const prompts = html("div", { class: "prompts" });
  const button = (label, name, onclick) => html("button", { type: "button", "aria-label": name, onclick }, label);
  const pick = html("select", { "aria-label": "step", onchange: () => go(Number(pick.value)) });
  const back = button("‹", "the step before", () => go(state.step - 1)), on = button("›", "the next step", () => go(state.step + 1));
  const sorts = Object.keys(ORDERS).map((order) => html("button", { type: "button", "aria-pressed": "false", onclick: () => {
    state.order = order;
    show();
  } }, order));
  const which = html("select", { "aria-label": "run", onchange: () => {
    state.run = Number(which.value);
    fill(Math.min(state.step, runs[state.run].samples.length - 1));
  } }, ...runs.map((run, i) => html("option", { value: i }, run.name)));
  const legend = html("span", { class: "scale" });

  function fill(step) {
    const { samples } = runs[state.run];
    pick.replaceChildren(...samples.map((sample, i) => html("option", { value: i }, `${sample.stage} · step ${sample.step}`)));
    const [low, high] = scaleOf(samples);
    const unscored = samples.some((s) => s.prompts.some((p) => p.completions.some((c) => c.reward === null)));
    legend.replaceChildren(`reward ${low}`,
      html("span", { class: "ramp", style: `background:linear-gradient(90deg,${data.viridis.map(css).join(",")})` }), `${high}`,
      html("span", { class: "swatch gold" }), "gold",
      ...(unscored ? [html("span", { class: "swatch", style: `background:${css(data.unscored)}` }), "not scored"] : []));
    go(step);
  }

  function go(step) {
    state.step = Math.min(Math.max(step, 0), runs[state.run].samples.length - 1);
    show();
  }

  function show() {
    const { samples } = runs[state.run], scale = scaleOf(samples);
    pick.value = state.step;
    back.disabled = state.step === 0;
    on.disabled = state.step === samples.length - 1;
    sorts.forEach((one) => one.setAttribute("aria-pressed", String(one.textContent === state.order)));
    prompts.replaceChildren(...arranged(samples[state.step].prompts, state.order).map((one) => prompt(one, scale)));
  }

  host.append(html("div", { class: "bar" },
    ...(runs.length > 1 ? [html("span", { class: "group" }, which)] : []),
    html("span", { class: "group", role: "group", "aria-label": "step" }, back, pick, on),
    html("span", { class: "group", role: "group", "aria-label": "sort by" }, ...sorts), legend), prompts);
  fill(state.step);
}

const host = document.getElementById("gallery");
if (host) gallery(host);
