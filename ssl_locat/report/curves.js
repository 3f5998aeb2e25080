// The curves of the report, drawn by uPlot from the numbers in #curves-data (charts.py): values under the pointer, zoom, smoothing.
// Every text from the run is set as textContent or drawn on a canvas; nothing of it is ever read as HTML.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("curves-data").textContent);
  const plots = [], together = [];
  const variable = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = line => variable(`--series-${line.color}`);
  const smoothing = document.getElementById("smooth"), whole = document.getElementById("whole");
  const kept = (key, value) => {  // across reloads of a page that is watched; a browser may forbid it
    try { return value === undefined ? sessionStorage.getItem(key) : sessionStorage.setItem(key, value); } catch { return null; }
  };

  const number = value => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return size >= 1e-3 && size < 1e6 ? String(+value.toPrecision(4)) : value.toExponential(2);
  };
  const place = value => Math.round(value).toLocaleString("en");

  // means under a bell of a fiftieth of the run's length to each side; the raw curve stays visible behind it
  const smooth = (x, y) => {
    const width = (x[x.length - 1] - x[0]) / 50;
    if (!(width > 0)) return y;
    let first = 0;
    return y.map((_, i) => {
      while (x[first] < x[i] - 3 * width) first++;
      let sum = 0, weights = 0;
      for (let j = first; j < x.length && x[j] <= x[i] + 3 * width; j++) {
        const weight = Math.exp(-0.5 * ((x[j] - x[i]) / width) ** 2);
        sum += weight * y[j];
        weights += weight;
      }
      return sum / weights;
    });
  };

  // the columns of one line: y, then the raw curve behind a smoothed one, then its extremes
  const COLUMNS = 4;
  const columns = line => {
    const smoothed = smoothing.checked && !line.dots && line.x.length > 8;
    const none = line.x.map(() => null);
    return [line.x, smoothed ? smooth(line.x, line.y) : line.y, smoothed ? line.y : none,
            !smoothed && line.low || none, !smoothed && line.high || none];
  };
  const data = chart => uPlot.join(chart.lines.map(columns));

  const extent = lines => [Math.min(...lines.map(l => l.x[0])), Math.max(...lines.map(l => l.x[l.x.length - 1]))];
  const padded = ([low, high]) => low === high ? [low - 1, high + 1] : [low, high];
  const run = charts.filter(chart => chart.wholeRun);
  const runExtent = run.length ? padded(extent(run.flatMap(chart => chart.lines))) : [0, 1];
  const fullOf = chart => chart.wholeRun ? runExtent : padded(extent(chart.lines));

  let zooming = false;
  const zoom = (plot, min, max) => {  // this chart, and those that share its axis
    zooming = true;
    for (const other of plot.chart.wholeRun ? together : [plot]) other.u.setScale("x", { min, max });
    zooming = false;
    note();
  };
  const isZoomed = plot => plot.u.scales.x.min !== plot.full[0] || plot.u.scales.x.max !== plot.full[1];
  const note = () => {
    whole.disabled = !plots.some(isZoomed);
    kept("zoom", together.length && isZoomed(together[0]) ? JSON.stringify([together[0].u.scales.x.min, together[0].u.scales.x.max]) : "");
  };
  const unzoom = () => {
    zooming = true;
    for (const plot of plots) plot.u.setScale("x", { min: plot.full[0], max: plot.full[1] });
    zooming = false;
    note();
  };

  const element = (name, className, parent) => {
    const made = document.createElement(name);
    made.className = className;
    parent?.append(made);
    return made;
  };

  // one button a curve, which hides it, and its value under the pointer
  const makeLegend = (plot, box) => {
    plot.at = element("span", "at", box);
    plot.values = plot.chart.lines.map((line, i) => {
      const button = element("button", "curve", box);
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      const swatch = element("i", line.dashed ? "dashed" : "", button);
      swatch.style.borderColor = `var(--series-${line.color})`;
      element("span", "", button).textContent = line.label;
      const value = element("b", "", button);
      button.addEventListener("click", () => {
        const show = !plot.u.series[1 + COLUMNS * i].show;
        plot.u.batch(() => { for (let c = 0; c < COLUMNS; c++) plot.u.setSeries(1 + COLUMNS * i + c, { show }); });
        button.setAttribute("aria-pressed", String(show));
      });
      return value;
    });
  };
  const showValues = plot => {
    const { u, chart } = plot, index = u.cursor.idx, over = index !== null && index !== undefined && u.cursor.left >= 0;
    const x = over ? u.data[0][index] : null;
    const near = over ? chart.marks.filter(mark => Math.abs(u.valToPos(mark.x, "x") - u.cursor.left) < 5) : [];
    plot.at.textContent = over ? [`${chart.xlabel} ${place(x)}`, ...new Set(near.map(mark => mark.label))].join(" · ") : "";
    plot.values.forEach((box, i) => {
      const found = over ? u.cursor.idxs[1 + COLUMNS * i] : null;
      const line = chart.lines[i];
      box.textContent = over ? number(found === null || found === undefined ? null : u.data[1 + COLUMNS * i][found])
                             : number(line.y[line.y.length - 1]);
    });
  };
  // where runs were not measured at the same steps, a curve's own nearest point
  const nearest = (u, series, index) => {
    const values = u.data[series];
    for (let away = 0; away < values.length; away++) {
      for (const i of [index - away, index + away]) if (values[i] !== null && values[i] !== undefined) return i;
    }
    return index;
  };

  const drawMarks = plot => u => {
    const { ctx, bbox } = u, scale = devicePixelRatio, chart = plot.chart;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.font = `${11 * scale}px system-ui, sans-serif`;
    ctx.lineWidth = scale;
    if (chart.level) {
      const y = u.valToPos(chart.level.y, "y", true);
      ctx.strokeStyle = ctx.fillStyle = variable("--soft");
      ctx.setLineDash([2 * scale, 3 * scale]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.textAlign = "right";
      const under = y - bbox.top < 16 * scale;
      ctx.fillText(chart.level.label, bbox.left + bbox.width - 4 * scale, y + (under ? 12 : -4) * scale);
    }
    const across = chart.marks.filter(mark => !mark.curve), seen = [];
    for (const mark of across) {
      const x = u.valToPos(mark.x, "x", true);
      if (!seen.includes(mark.label)) seen.push(mark.label);
      const row = seen.indexOf(mark.label);
      ctx.strokeStyle = ctx.fillStyle = variable(`--series-${7 - row % 4}`);
      ctx.setLineDash([]);
      ctx.globalAlpha = 0.6;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.globalAlpha = 1;
      if (across.find(other => other.label === mark.label) !== mark) continue;  // the first of its kind has its name
      const left = x + ctx.measureText(mark.label).width + 6 * scale > bbox.left + bbox.width;
      ctx.textAlign = left ? "right" : "left";
      ctx.fillText(mark.label, x + (left ? -3 : 3) * scale, bbox.top + (12 + 13 * (row % 4)) * scale);
    }
    for (const mark of chart.marks.filter(mark => mark.curve)) {
      chart.lines.forEach((line, i) => {
        if (line.name !== mark.curve || !line.x.length || !u.series[1 + COLUMNS * i].show) return;
        const at = line.x.reduce((best, x, j) => Math.abs(x - mark.x) < Math.abs(line.x[best] - mark.x) ? j : best, 0);
        const x = u.valToPos(line.x[at], "x", true), y = u.valToPos(line.y[at], "y", true);
        ctx.setLineDash([]);
        ctx.strokeStyle = ctx.fillStyle = variable("--ink");
        ctx.lineWidth = 1.5 * scale;
        ctx.beginPath();
        ctx.arc(x, y, 5 * scale, 0, 2 * Math.PI);
        ctx.stroke();
        const low = y - bbox.top < 24 * scale;
        const wide = ctx.measureText(mark.label).width;
        const left = Math.min(Math.max(x - wide / 2, bbox.left + 2 * scale), bbox.left + bbox.width - wide - 2 * scale);
        ctx.textAlign = "left";
        ctx.fillText(mark.label, left, y + (low ? 19 : -10) * scale);
      });
    }
    ctx.restore();
  };

  const make = (chart, number_) => {
    const box = document.getElementById(`chart${number_}`), legend = box.parentElement.querySelector(".legend");
    const plot = { chart, full: fullOf(chart) };
    const faint = line => () => colour(line) + "55";
    const series = chart.lines.flatMap(line => [
      { stroke: () => colour(line), width: 1.6, dash: line.dashed ? [6, 4] : undefined, spanGaps: true,
        points: line.dots || line.x.length < 3 ? { show: true, size: 6, fill: () => colour(line) } : { show: false } },
      { stroke: faint(line), width: 1, spanGaps: true, points: { show: false } },
      { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } },
      { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } },
    ]);
    const bands = chart.lines.map((line, i) => ({ series: [4 + COLUMNS * i, 3 + COLUMNS * i], fill: () => colour(line) + "33" }));
    const range = (u, low, high) => {
      if (low === null) return [0, 1];
      const all = u.scales.x.min <= plot.full[0] && u.scales.x.max >= plot.full[1];
      if (chart.level && all) [low, high] = [Math.min(low, chart.level.y), Math.max(high, chart.level.y)];
      const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      return [low - pad, high + pad];
    };
    const whole_ = [1, 2, 5].flatMap(step => [...Array(16).keys()].map(power => step * 10 ** power)).sort((a, b) => a - b);
    const axis = { stroke: () => variable("--soft"), grid: { stroke: () => variable("--line"), width: 1 }, ticks: { show: false },
                   font: "12px system-ui, sans-serif" };
    const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });
    plot.u = new uPlot({
      width: Math.max(box.clientWidth, 200), height: 230, legend: { show: false }, pxAlign: false, padding: [8, 10, 0, 0],
      scales: { x: { time: false, range: (_, min, max) => min === null ? plot.full : [min, max] },
                y: chart.log ? { distr: 3 } : { range } },
      // all axes count steps, images or layers: whole numbers
      axes: [{ ...axis, size: 28, incrs: whole_, values: (_, ticks, a, b, step) => ticks.map(t => step >= 1000 ? compact.format(t) : t.toLocaleString("en")) },
             { ...axis, size: 58, values: (_, ticks) => ticks.map(t => t === null ? null : Math.abs(t) >= 1e4 ? compact.format(t) : String(+t.toPrecision(6))) }],
      series: [{}, ...series], bands,
      cursor: {
        dataIdx: nearest, drag: { x: true, y: false, setScale: true },
        points: { size: 7 },
        ...(chart.wholeRun ? { sync: { key: "run", scales: ["x", null], setSeries: false,
                                       filters: { pub: type => type !== "mousedown" && type !== "mouseup" && type !== "dblclick" } } } : {}),
        bind: { dblclick: () => () => { unzoom(); return null; } },
      },
      hooks: {
        draw: [drawMarks(plot)],
        setCursor: [() => plot.u && showValues(plot)],
        setScale: [(u, key) => { if (key === "x" && plot.u && !zooming) zoom(plot, u.scales.x.min, u.scales.x.max); }],
      },
    }, data(chart), box);
    makeLegend(plot, legend);
    showValues(plot);
    new ResizeObserver(() => {
      if (box.clientWidth && box.clientWidth !== plot.u.width) plot.u.setSize({ width: box.clientWidth, height: 230 });
    }).observe(box);
    plots.push(plot);
    if (chart.wholeRun) together.push(plot);
  };

  smoothing.checked = kept("smooth") === "yes";
  charts.forEach(make);
  unzoom();
  try {
    const [min, max] = JSON.parse(kept("zoom"));
    if (together.length && min < max) zoom(together[0], min, max);
  } catch { /* nothing kept */ }
  smoothing.addEventListener("change", () => {
    kept("smooth", smoothing.checked ? "yes" : "no");
    for (const plot of plots) plot.u.setData(data(plot.chart), false), plot.u.redraw();
  });
  whole.addEventListener("click", unzoom);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(plot => plot.u.redraw(false)));
  document.documentElement.dataset.curves = plots.length;  // all are drawn
})();
