// The image of a dot, and its label, beside the pointer. Labels are set as textContent, never read as HTML.
"use strict";
for (const figure of document.querySelectorAll("figure.scatter")) {
  const sprite = figure.querySelector(".sprite"), columns = +figure.dataset.columns, tile = +figure.dataset.tile, size = 2.4 * tile;
  const tip = document.createElement("div"), picture = document.createElement("div"), label = document.createElement("span");
  tip.className = "tip";
  tip.hidden = true;
  tip.append(picture, label);
  figure.append(tip);
  picture.style.width = picture.style.height = `${size}px`;
  picture.style.backgroundImage = `url(${sprite.src})`;
  picture.style.backgroundSize = `${columns * size}px auto`;
  const dots = [...figure.querySelectorAll("circle")];
  dots.forEach((dot, index) => {
    dot.addEventListener("pointerenter", event => {
      picture.style.backgroundPosition = `${-(index % columns) * size}px ${-Math.floor(index / columns) * size}px`;
      label.textContent = dot.dataset.label ?? "";
      const box = figure.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      tip.style.left = `${Math.min(x + 14, box.width - size - 20)}px`;
      tip.style.top = `${Math.max(y - size - 40, 0)}px`;
      tip.hidden = false;
    });
    dot.addEventListener("pointerleave", () => { tip.hidden = true; });
  });
}
