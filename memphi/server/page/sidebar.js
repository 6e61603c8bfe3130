// The conversations kept in this browser, the latest first; on a phone they lie in a drawer.

import { byId, h } from "./dom.js";

const DAY_MS = 86_400_000;

export class Sidebar {
  #open;

  /** open(id) shows a conversation; create() begins one. */
  constructor({ open, create }) {
    this.#open = open;
    byId("new").onclick = byId("new-narrow").onclick = () => {
      this.drawer(false);
      create();
    };
    byId("menu").onclick = () => this.drawer(true);
    byId("shade").onclick = () => this.drawer(false);
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.drawer(false));
    this.#narrow.addEventListener("change", () => this.drawer(false));
    this.drawer(false);
  }

  #narrow = matchMedia("(max-width: 760px)");

  /** Open or close the drawer; where there is room the sidebar always stands open. */
  drawer(open) {
    const wasOpen = document.body.classList.contains("drawer");
    document.body.classList.toggle("drawer", open && this.#narrow.matches);
    byId("sidebar").inert = this.#narrow.matches && !open;
    byId("main").inert = this.#narrow.matches && open;
    byId("menu").setAttribute("aria-expanded", open);
    if (open) byId("new").focus();
    else if (wasOpen) byId("menu").focus();
  }

  /** List conversations, and mark the one at hand. */
  show(conversations, currentId) {
    const list = byId("conversations");
    list.replaceChildren();
    let heading = null;
    for (const { id, title, changed } of conversations) {
      const age = ageOf(changed);
      if (age !== heading) list.append(h("li", { class: "heading" }, (heading = age)));
      const button = h(
        "button",
        { type: "button", "aria-current": id === currentId ? "true" : undefined, title },
        title,
      );
      button.onclick = () => {
        this.drawer(false);
        this.#open(id);
      };
      list.append(h("li", {}, button));
    }
  }
}

function ageOf(time) {
  const days = Math.floor(new Date().setHours(24, 0, 0, 0) / DAY_MS - time / DAY_MS);
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 8 ? "Last week" : "Earlier";
}
