"use strict";
// Draws each chart when it can be seen; those in closed details once these are opened. "#all" opens everything.
const specs = JSON.parse(document.getElementById("charts").textContent);
function draw(place) {
  if (place.dataset.drawn) return;
  place.dataset.drawn = "yes";
  vegaEmbed(place, specs[place.dataset.chart], { actions: false, renderer: "svg" }).catch((error) => console.error(error));
}
for (const details of document.querySelectorAll("details")) {
  if (location.hash === "#all") details.open = true;
  details.addEventListener("toggle", () => details.open && details.querySelectorAll(".chart").forEach(draw));
}
for (const place of document.querySelectorAll(".chart")) if (!place.closest("details:not([open])")) draw(place);
