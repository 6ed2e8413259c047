"use strict";
(function () {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(hover: none)").matches;
  const drawn = new Set();

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  // What depends on light and dark: the figures themselves have no background and no font colour.
  function theme(layout) {
    const text = colour("--text"), grid = colour("--grid"), line = colour("--line");
    const changes = {
      "font.color": text, "font.size": 12,
      "font.family": getComputedStyle(document.body).fontFamily,
      "hoverlabel.bgcolor": colour("--panel"), "hoverlabel.bordercolor": line,
      "hoverlabel.font.color": text, "legend.bgcolor": "rgba(0,0,0,0)",
      "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": colour("--soft"),
      "modebar.activecolor": colour("--accent"),
    };
    const axes = new Set(["xaxis", "yaxis"]);
    Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)).forEach((key) => axes.add(key));
    axes.forEach((axis) => {
      changes[axis + ".gridcolor"] = grid;
      changes[axis + ".linecolor"] = line;
      changes[axis + ".zerolinecolor"] = line;
    });
    return changes;
  }

  function dress(chart) {
    const written = chart.data.flatMap((trace, index) => trace.texttemplate ? [index] : []);
    if (written.length) Plotly.restyle(chart, { "textfont.color": colour("--text") }, written);
    return Plotly.relayout(chart, theme(chart.layout));
  }

  function draw(chart) {
    if (drawn.has(chart)) return;
    drawn.add(chart);
    try {
      const spec = JSON.parse(document.getElementById(chart.id + "-data").textContent);
      const config = {
        displaylogo: false, responsive: true, displayModeBar: touch ? false : "hover",
        modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
        scrollZoom: false,
      };
      Plotly.newPlot(chart, spec.data, spec.layout, config).then(() => {
        const group = chart.closest(".curves");
        if (group) settle(group, chart);
        return dress(chart);
      });
    } catch (error) {
      chart.classList.add("failed");
      chart.textContent = "This figure could not be drawn: " + error.message;
    }
  }

  const charts = Array.from(document.querySelectorAll(".chart"));
  if (typeof Plotly === "undefined") {
    charts.forEach((chart) => chart.classList.add("failed"));
  } else if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
      if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
    }), { rootMargin: "600px" });
    charts.forEach((chart) => seen.observe(chart));
  } else {
    charts.forEach(draw);
  }
  window.addEventListener("beforeprint", () => charts.forEach(draw));
  dark.addEventListener("change", () => drawn.forEach((chart) => {
    if (chart.layout) dress(chart);
  }));

  // One legend for the figures of a group: lines are hidden, axes switched, in all of them.
  function settle(group, chart) {
    const hidden = new Set(Array.from(group.querySelectorAll("[data-line][aria-pressed=false]"),
      (button) => button.dataset.line));
    const visible = chart.data.map((trace) => !hidden.has(trace.legendgroup));
    Plotly.restyle(chart, { visible: visible });
    const pressed = (axis) =>
      group.querySelector(`[data-axis=${axis}]`).getAttribute("aria-pressed") === "true";
    const changes = {};
    const turn = (axis, log) => { // a type that is set anew forgets the axis' range
      const wanted = log ? "log" : "linear";
      if ((chart.layout[axis].type || "linear") !== wanted) changes[axis + ".type"] = wanted;
    };
    turn("xaxis", pressed("x"));
    if (chart.id.endsWith("-loss")) turn("yaxis", pressed("y"));
    if (Object.keys(changes).length) Plotly.relayout(chart, changes);
  }

  document.querySelectorAll(".curves .legend button").forEach((button) => {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!on));
      const group = button.closest(".curves");
      group.querySelectorAll(".chart").forEach((chart) => {
        if (chart.layout) settle(group, chart);
      });
    });
  });

  // Tables: rows beyond the first few, and sorting by a column; a second click turns it round.
  document.querySelectorAll(".all").forEach((button) => {
    button.addEventListener("click", () => {
      document.getElementById(button.dataset.table).classList.add("opened");
      button.parentElement.remove();
    });
  });
  document.querySelectorAll("th .sort").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
      const column = Array.from(head.parentElement.children).indexOf(head);
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th[aria-sort]").forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.children[column], value = cell.dataset.v;
        if (value === undefined) return cell.textContent === "–" ? null : cell.textContent;
        return value !== "" && !isNaN(value) ? Number(value) : value;
      };
      const compare = (left, right) => {
        const a = key(left), b = key(right);
        if (a === null || b === null) return (a === null) - (b === null);
        const order = typeof a === "number" && typeof b === "number"
          ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
        return down ? -order : order;
      };
      table.classList.add("opened");
      Array.from(body.rows).sort(compare).forEach((row) => body.append(row));
    });
  });
})();
