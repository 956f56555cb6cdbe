// Draws the figures of the page, in its colours, and gives keys and buttons to what plotly.js gives the mouse alone.
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const live = document.getElementById("live");
  const charts = [...document.querySelectorAll(".chart")];
  const NARROW = 420; // below it a name and a verdict share a line in smaller letters
  const PRINT_WIDE = 660, PRINT_HALF = 325; // A4 less its margins, in CSS pixels
  let printing = false;

  // ---- colours: "@ink", "@series0/0.16"

  const colours = () => (printing || !dark.matches ? page.light : page.dark);

  function colour(text, palette) {
    if (!text.startsWith("@")) return text;
    const [name, alpha] = text.slice(1).split("/");
    const hex = palette[name];
    if (alpha === undefined) return hex;
    const n = parseInt(hex.slice(1), 16);
    return `rgba(${n >> 16}, ${(n >> 8) & 255}, ${n & 255}, ${alpha})`;
  }

  function painted(value, key, palette) {
    if (typeof value === "string") return /color$|^colorscale$/.test(key) ? colour(value, palette) : value;
    if (Array.isArray(value)) return value.map((item) => painted(item, key, palette));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, name, palette)]));
  }

  // ---- drawing

  const width = (chart) =>
    printing ? (chart.closest(".charts").childElementCount === 1 || chart.closest(".charts.wide") ? PRINT_WIDE : PRINT_HALF) : chart.clientWidth;

  function layout(chart, figure) {
    const family = getComputedStyle(document.body).fontFamily;
    const made = painted(figure.layout, "", colours());
    made.width = width(chart);
    made.dragmode = coarse.matches ? false : "zoom";
    made.font = { ...made.font, family };
    if (made.width < NARROW) for (const note of made.annotations || []) note.font.size = note.xanchor === "right" ? 10 : 11;
    for (const axis of ["xaxis", "yaxis"]) {
      if (chart.view && chart.view[axis]) Object.assign(made[axis], { range: chart.view[axis], autorange: false });
    }
    return made;
  }

  function traces(chart, figure) {
    const made = painted(figure.data, "", colours());
    for (const trace of made) if (chart.hiddenGroups.has(trace.legendgroup)) trace.visible = false;
    return made;
  }

  const config = { displayModeBar: false, scrollZoom: false, doubleClick: "reset", showTips: false };

  function draw(chart) {
    const figure = page.figures[Number(chart.dataset.figure)];
    if (chart.drawn) {
      Plotly.react(chart, traces(chart, figure), layout(chart, figure), config);
      return;
    }
    chart.hiddenGroups = new Set();
    chart.replaceChildren();
    Plotly.newPlot(chart, traces(chart, figure), layout(chart, figure), config);
    chart.drawn = true;
    chart.home = view(chart);
    chart.on("plotly_relayout", () => (chart.view = view(chart)));
    chart.on("plotly_doubleclick", () => reset(chart));
  }

  function view(chart) {
    const { xaxis, yaxis } = chart._fullLayout;
    return { xaxis: [...xaxis.range], yaxis: [...yaxis.range] };
  }

  const drawn = () => charts.filter((chart) => chart.drawn);
  const redraw = () => drawn().forEach(draw);

  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    printing = true;
    charts.forEach(draw);
  });
  addEventListener("afterprint", () => {
    printing = false;
    redraw();
  });

  const resized = new ResizeObserver((entries) => {
    requestAnimationFrame(() => {
      for (const { target } of entries) {
        if (target.drawn && !printing && Math.abs(target._fullLayout.width - target.clientWidth) > 1)
          Plotly.relayout(target, { width: target.clientWidth });
      }
    });
  });

  // ---- zoom

  function zoom(chart, factor) {
    const now = view(chart), change = {};
    for (const axis of ["xaxis", "yaxis"]) {
      if (chart._fullLayout[axis].fixedrange) continue;
      const [a, b] = now[axis], middle = (a + b) / 2, half = ((b - a) / 2) * factor;
      change[`${axis}.range`] = [middle - half, middle + half];
    }
    Plotly.relayout(chart, change);
  }

  function pan(chart, axis, part) {
    if (chart._fullLayout[axis].fixedrange) return;
    const [a, b] = view(chart)[axis], by = (b - a) * part;
    Plotly.relayout(chart, { [`${axis}.range`]: [a + by, b + by] });
  }

  const reset = (chart) =>
    Plotly.relayout(chart, { "xaxis.range": [...chart.home.xaxis], "yaxis.range": [...chart.home.yaxis] });

  const save = (chart) =>
    Plotly.downloadImage(chart, { format: "svg", filename: chart.dataset.name, width: chart.clientWidth, height: chart.clientHeight });

  const actions = { in: (c) => zoom(c, 0.5), out: (c) => zoom(c, 2), reset, save };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-action], button[data-group]");
    if (!button) return;
    const own = [...button.closest("figure").querySelectorAll(".chart")].filter((chart) => chart.drawn);
    if (button.dataset.action) own.forEach(actions[button.dataset.action]);
    else toggle(button, own);
  });

  function toggle(button, own) {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const chart of own) {
      chart.hiddenGroups[shown ? "delete" : "add"](button.dataset.group);
      draw(chart);
    }
  }

  // ---- keys: arrows go from point to point, shift and arrows move the view

  function stops(chart) {
    return chart._fullData.filter((trace) => trace.visible === true && trace.hoverinfo !== "skip" && size(trace));
  }

  const size = (trace) => (trace.type === "heatmap" ? trace.z.length : trace.x.length);

  function step(chart, key) {
    const all = stops(chart);
    if (!all.length) return;
    const at = chart.at || { trace: 0, row: 0, point: -1 };
    const across = key === "ArrowRight" ? 1 : key === "ArrowLeft" ? -1 : 0;
    const along = key === "ArrowDown" ? 1 : key === "ArrowUp" ? -1 : 0;
    const heat = all[0].type === "heatmap";
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
    if (heat) at.row = clamp(at.row + along, all[0].z.length);
    else at.trace = clamp(at.trace + along, all.length);
    const trace = all[at.trace];
    at.point = clamp(at.point + across, heat ? trace.x.length : size(trace));
    chart.at = at;
    const place = heat ? { xval: trace.x[at.point], yval: trace.y[at.row] } : { pointNumber: at.point };
    Plotly.Fx.hover(chart, [{ curveNumber: trace.index, ...place }]);
    requestAnimationFrame(() => (live.textContent = said(chart)));
  }

  const said = (chart) =>
    [...chart.querySelectorAll(".hoverlayer text")]
      .map((text) => [...text.querySelectorAll("tspan")].map((line) => line.textContent).join(", ") || text.textContent)
      .filter(Boolean)
      .join("; ");

  function pressed(event) {
    const chart = event.currentTarget;
    if (!chart.drawn || event.altKey || event.ctrlKey || event.metaKey) return;
    const { key } = event;
    if (key.startsWith("Arrow") && event.shiftKey) {
      if (key === "ArrowLeft" || key === "ArrowRight") pan(chart, "xaxis", key === "ArrowRight" ? 0.25 : -0.25);
      else pan(chart, "yaxis", key === "ArrowUp" ? 0.25 : -0.25);
    } else if (key.startsWith("Arrow")) step(chart, key);
    else if (key === "+" || key === "=") zoom(chart, 0.5);
    else if (key === "-") zoom(chart, 2);
    else if (key === "0") reset(chart);
    else if (key === "Escape") {
      Plotly.Fx.unhover(chart);
      chart.at = undefined;
    } else return;
    event.preventDefault();
  }

  // ---- one chart at a time, so that the page can be read meanwhile

  for (const chart of charts) chart.addEventListener("keydown", pressed);
  const waiting = [...charts];
  (function next() {
    const chart = waiting.shift();
    if (!chart) {
      document.documentElement.dataset.drawn = "true";
      return;
    }
    if (!chart.drawn) draw(chart);
    resized.observe(chart);
    setTimeout(next, 0);
  })();
})();
