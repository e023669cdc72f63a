"use strict";
// A readout under the pointer, a legend that hides lines, tables that sort; the page says everything without them.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plot = document.querySelector("#main-figure .plot");
  const pointer = plot.querySelector(".pointer"), readout = plot.querySelector(".readout");
  const hide = () => { pointer.hidden = readout.hidden = true; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const chart = [...plot.querySelectorAll("svg.chart")].find((svg) => svg.getBoundingClientRect().width > 0);
    if (!chart) return;
    const box = chart.getBoundingClientRect(), scale = box.width / chart.viewBox.baseVal.width;
    const left = Number(chart.dataset.left), right = Number(chart.dataset.right), most = Number(chart.dataset.xmax);
    const share = ((event.clientX - box.left) / scale - left) / (right - left);
    if (!(share >= 0 && share <= 1)) return hide();
    const i = Math.round(share * (data.x.length - 1));
    const at = (left + (data.x[i] / most) * (right - left)) * scale;
    readout.replaceChildren(Object.assign(document.createElement("b"), { textContent: `r = ${data.x[i].toFixed(2)}` }));
    for (const s of data.series) {
      if (s.off) continue;
      const line = document.createElement("div");
      line.append(Object.assign(document.createElement("span"), { textContent: s.name, className: s.c }),
        Object.assign(document.createElement("span"), { textContent: `${s.y[i].toFixed(1)}%` }));
      readout.append(line);
    }
    pointer.hidden = readout.hidden = false;
    pointer.style.left = `${at}px`;
    if (at > box.width * 0.55) { readout.style.left = ""; readout.style.right = `${box.width - at + 12}px`; }
    else { readout.style.right = ""; readout.style.left = `${at + 12}px`; }
  });
  for (const button of document.querySelectorAll("#main-figure button[data-series]")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const mark of plot.querySelectorAll(`svg.chart .${button.dataset.series}`)) mark.classList.toggle("off", !shown);
      data.series[Number(button.dataset.series.slice(1))].off = !shown;
    });
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    const order = (column, down) => {
      // a row "at least" stays below its run
      const groups = [];
      for (const row of [...body.rows]) row.classList.contains("surely") ? groups.at(-1).push(row) : groups.push([row]);
      const value = ([row]) => column ? parseFloat(row.cells[column].firstChild?.textContent ?? "") : row.cells[0].textContent.trim();
      const known = (v) => typeof v === "string" || !Number.isNaN(v);
      groups.sort((a, b) => {
        const x = value(a), y = value(b);
        if (!known(x) || !known(y)) return Number(known(y)) - Number(known(x));
        return (typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y) * (down ? -1 : 1);
      });
      body.append(...groups.flat());
    };
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      const sort = () => {
        const down = column ? head.getAttribute("aria-sort") !== "descending" : head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        order(column, down);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
    });
  }
})();
