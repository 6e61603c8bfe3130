// The memory budget as a live bar, and with it how the server is: asked again and again while the page is seen.

import { byId, h, sized } from "./dom.js";

const REST_MS = 2000;
const BUSY_MS = 600;
/** The ledger's accounts in the order of the bar: what each is called here, and where the plan has it. */
const ACCOUNTS = [
  ["weights", "Weights", "weights_bytes"],
  ["context", "Device context", "context_bytes"],
  ["work space", "Work space", "workspace_bytes"],
  ["media embeddings", "Media embeddings", "media_bytes"],
  ["pages", "Keys and values", null],
  ["promised pages", "Promised", null],
];

export class Memory {
  #server;
  #entered;
  #state = null;
  #timer = null;
  busy = false;

  /** entered maps states (ready, locked, loading, …) to what is called when the server comes into one. */
  constructor(server, entered) {
    this.#server = server;
    this.#entered = entered;
    document.addEventListener("visibilitychange", () => this.poll());
    this.poll();
  }

  /** Ask now, and from now on as long as the page is seen. */
  async poll() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    try {
      this.#become(...(await this.#ask()));
    } finally {
      clearTimeout(this.#timer);
      const rest = this.#state === "ready" && this.busy ? BUSY_MS : REST_MS;
      // Without the key there is nothing to be seen; who enters it asks again.
      if (this.#state !== "locked") this.#timer = setTimeout(() => this.poll(), rest);
    }
  }

  /** The server's state, and what is to be said of it. */
  async #ask() {
    try {
      this.#show(await this.#server.json("/memory", { quiet: true }));
      return ["ready", ""];
    } catch (error) {
      return this.#trouble(error);
    }
  }

  #become(state, text) {
    document.body.dataset.server = state;
    if (byId("server-state").textContent !== text) byId("server-state").textContent = text;
    const before = this.#state;
    this.#state = state;
    if (state !== before) this.#entered[state]?.();
  }

  /** The state that an error means, and what to say of it. */
  async #trouble(error) {
    if (error.status === 401) return ["locked", "The server wants an API key."];
    if (error.status !== 503) return ["away", error.message];
    const health = await fetch("/health")
      .then((response) => response.json())
      .catch(() => ({})); // What stands before the server may answer in words of its own.
    if (health.state !== "loading") return [health.state ?? "away", error.message];
    const share = health.total_bytes ? ` ${Math.floor((100 * health.loaded_bytes) / health.total_bytes)} %` : "";
    return ["loading", `The model is being loaded…${share}`];
  }

  #show(told) {
    // Several devices are one bar.
    const engines = told.engines ?? [told];
    const all = (bytesOf) => engines.reduce((sum, engine) => sum + (bytesOf(engine) ?? 0), 0);
    // Before the first step the ledger is empty, but what is planned for more than pages is held from the beginning.
    const held = ACCOUNTS.map(([account, name, planned]) => {
      const bytes = all(({ plan, accounts }) => accounts[account] ?? plan[planned]);
      return { account, name, bytes, reason: engines[0].plan.reasons?.[planned] };
    });
    const heldBytes = held.reduce((sum, { bytes }) => sum + bytes, 0);
    const budgetBytes = all(({ plan }) => plan.budget_bytes);
    const parts = [...held, { account: "free", name: "Free", bytes: Math.max(0, budgetBytes - heldBytes) }];
    byId("memory-total").textContent = `${sized(heldBytes)} of ${sized(budgetBytes)}`;
    for (const bar of document.querySelectorAll(".memory-bar")) draw(bar, parts);
    const label = `${sized(heldBytes)} of ${sized(budgetBytes)} are held`;
    byId("memory-bar").setAttribute("aria-label", label);
    const legend = byId("memory-legend");
    if (!legend.children.length) legend.append(...parts.map(entry));
    parts.forEach(({ bytes }, index) => (legend.children[index].lastChild.textContent = sized(bytes)));
  }
}

function draw(bar, parts) {
  if (!bar.children.length) bar.append(...parts.map(({ account }) => h("i", { "data-account": account })));
  parts.forEach(({ bytes }, index) => (bar.children[index].style.flexGrow = bytes / 2 ** 20));
}

const entry = ({ account, name, reason }) =>
  h("li", { title: reason }, h("i", { "data-account": account }), h("span", {}, name), h("b", {}));
