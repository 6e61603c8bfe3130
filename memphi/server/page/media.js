// How attachments look: a picture as a thumbnail that opens, a recording as a small player with its shape.

import { byId, clock, h, icon, sized } from "./dom.js";

/** A picture or a player, whichever the attachment is; its name alone where its content is lost. */
export function preview(attachment, url) {
  if (!attachment.blob) return lost(attachment);
  return attachment.kind === "image" ? picture(attachment, url) : player(attachment, url);
}

const lost = ({ name }) =>
  h("div", { class: "player", title: name }, icon("alert"), h("span", { class: "name" }, `${name} is missing`));

function picture({ name }, url) {
  const image = h("img", { src: url, alt: name, loading: "lazy" });
  const button = h("button", { type: "button", class: "picture", title: name, "aria-label": `Show ${name}` }, image);
  button.onclick = () => enlarge(name, url);
  // Some pictures that the server reads, TIFF among them, no browser shows.
  image.onerror = () => {
    button.replaceChildren(icon("picture"), h("span", {}, name));
    button.disabled = true;
  };
  return button;
}

function enlarge(name, url) {
  const dialog = byId("enlarged");
  dialog.replaceChildren(h("img", { src: url, alt: name }));
  dialog.onclick = () => dialog.close();
  dialog.showModal();
}

function player({ name, blob, seconds, peaks }, url) {
  const shape = h("span", { class: "shape", "aria-hidden": "true" });
  for (const peak of peaks ?? []) {
    const bar = h("i");
    bar.style.height = `${Math.round(12 + 88 * peak)}%`;
    shape.append(bar);
  }
  const length = h("span", { class: "length" }, seconds === null ? sized(blob.size) : clock(seconds));
  if (seconds === null) {
    // What the browser cannot decode it cannot play either.
    return h("div", { class: "player", title: name }, icon("sound"), h("span", { class: "name" }, name), length);
  }
  const sound = new Audio(url);
  const look = { type: "button", class: "icon-button small", "aria-label": `Play ${name}` };
  const button = h("button", look, icon("play"));
  button.onclick = () => (sound.paused ? sound.play() : sound.pause());
  sound.onplay = sound.onpause = () => {
    button.replaceChildren(icon(sound.paused ? "play" : "pause"));
    button.setAttribute("aria-label", `${sound.paused ? "Play" : "Pause"} ${name}`);
  };
  sound.ontimeupdate = () => {
    const played = (sound.currentTime / seconds) * shape.children.length;
    [...shape.children].forEach((bar, index) => bar.classList.toggle("played", index < played && !sound.ended));
    length.textContent = clock(sound.ended ? seconds : sound.currentTime);
  };
  return h("div", { class: "player", title: name }, button, shape, length);
}
