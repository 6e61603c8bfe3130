// Makes elements, and other small things that all need. Text goes in as text: nothing here ever parses a string as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element: listeners as onclick, properties and attributes by their names, children as nodes or strings. */
export function h(tag, settings = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name in node && !name.startsWith("aria")) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

/** One of the icons that stand as symbols in index.html. */
export function icon(name) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("class", "icon");
  picture.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  picture.append(use);
  return picture;
}

/** A button that shows an icon and says its name to those who do not see it. */
export function iconButton(name, label, onclick, settings = {}) {
  return h(
    "button",
    { type: "button", class: "icon-button", title: label, "aria-label": label, onclick, ...settings },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

/** 1234567 as 1,234,567. */
export const grouped = (number) => number.toLocaleString("en-US");

export const counted = (number, word) => `${grouped(number)} ${word}${number === 1 ? "" : "s"}`;

/** Seconds as 1:05. */
export function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Seconds in words: 0.12 s, 3.4 s. */
export const lasted = (seconds) => `${seconds < 1 ? seconds.toFixed(2) : seconds.toFixed(1)} s`;

/** Bytes in GiB or MiB. */
export function sized(bytes) {
  if (bytes === 0) return "0";
  const gib = bytes / 2 ** 30;
  return gib >= 1 ? `${gib.toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
}

/** What work() returns; otherwise, where the browser refuses: with a site's data blocked, its stores throw. */
export function tried(work, otherwise = null) {
  try {
    return work();
  } catch {
    return otherwise;
  }
}

/** A name that nothing else has; randomUUID is not there over plain HTTP. */
export const newId = () =>
  [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
