"use strict";
// A readout under the pointer; the page says everything without it.
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
})();
