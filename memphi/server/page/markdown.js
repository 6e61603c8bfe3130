// From an answer's Markdown to nodes. HTML in an answer is shown as the text it is, and what is left is sanitised.

import DOMPurify from "./vendor/purify.es.mjs";
import { Marked } from "./vendor/marked.esm.js";
import { h, icon } from "./dom.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li a table thead tbody tr th td".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => text.replace(/[&<>"']/g, (character) => ENTITIES[character]);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ raw }) => escaped(raw),
    image: ({ raw }) => escaped(raw),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/** A fragment that shows an answer. */
export function rendered(markdown) {
  const fragment = DOMPurify.sanitize(marked.parse(markdown), ALLOWED);
  fragment.querySelectorAll("pre").forEach(frameCode);
  fragment.querySelectorAll("table").forEach((table) => {
    const scroller = h("div", { class: "wide", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(scroller);
    scroller.append(table);
  });
  fragment.querySelectorAll("a").forEach((link) => {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  });
  return fragment;
}

function frameCode(pre) {
  const language = /language-([\w+#.-]+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "code";
  pre.firstElementChild?.removeAttribute("class");
  pre.tabIndex = 0;
  const frame = h("div", { class: "code" });
  pre.replaceWith(frame);
  const text = pre.textContent;
  const copy = copyButton("Copy code", () => text);
  frame.append(h("div", { class: "code-head" }, h("span", {}, language), copy), pre);
}

/** A button that puts a text on the clipboard and says that it did. */
export function copyButton(label, textOf) {
  const button = h(
    "button",
    { type: "button", class: "icon-button small", title: label, "aria-label": label },
    icon("copy"),
  );
  button.onclick = async () => {
    await copied(textOf());
    button.replaceChildren(icon("check"));
    button.setAttribute("aria-label", "Copied");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1500);
  };
  return button;
}

/** Pages over plain HTTP from elsewhere have no clipboard; a selection can be copied everywhere. */
async function copied(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { value: text, class: "hidden-visually" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
