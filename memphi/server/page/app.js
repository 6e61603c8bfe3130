// Puts the page together: which conversation is at hand, what is being answered, what is kept.

import { Addresses } from "./attachments.js";
import { answer, bodyOf, DEFAULTS, emptyAnswer, openaiMessages, Prices } from "./chat.js";
import { Composer } from "./composer.js";
import { askForKey, confirmed } from "./dialogs.js";
import { byId, h, newId } from "./dom.js";
import { Memory } from "./memory.js";
import { Server } from "./server.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Transcript } from "./transcript.js";

const UNTITLED = "New conversation";
const SAVE_MS = 1500;
const TITLE_LETTERS = 60;

class App {
  #server = new Server((refused) => this.#askForKey(refused));
  #prices = new Prices(this.#server, async () => (await this.#learnModel()).id);
  #addresses = new Addresses();
  #store = null;
  #conversations = [];
  #current = null;
  /** Answers that grow, by conversation; one may grow while another conversation is read. */
  #running = new Map();
  #model = null;

  constructor() {
    this.#sidebar = new Sidebar({ open: (id) => this.#open(id), create: () => this.#create() });
    this.#settings = new Settings({
      changed: (settings) => this.#change(settings),
      forgetKey: () => this.#memory.poll(),
    });
    this.#transcript = new Transcript({
      root: byId("transcript"),
      scroller: byId("scroller"),
      jump: byId("jump"),
      addresses: this.#addresses,
      regenerate: () => this.#regenerate(),
    });
    this.#composer = new Composer({
      prices: this.#prices,
      context: () => ({ ...this.#current, contextTokens: this.#model?.memphi?.context_tokens }),
      send: (draft) => this.#send(draft),
      stop: () => this.#stop(),
    });
  }

  #sidebar;
  #settings;
  #transcript;
  #composer;
  #memory;

  async start() {
    this.#listen();
    this.#current = this.#blank();
    try {
      this.#store = await Store.open();
      this.#conversations = await this.#store.list();
    } catch {
      byId("unkept").hidden = false;
    }
    this.#memory = new Memory(this.#server, { ready: () => this.#serverIsReady(), locked: () => this.#unlock() });
    await this.#open(location.hash.slice(1));
    document.body.dataset.started = "true";
  }

  #listen() {
    byId("title").onchange = (event) => this.#rename(event.target.value);
    byId("title").addEventListener("keydown", (event) => event.key === "Enter" && event.target.blur());
    byId("export").onclick = () => this.#export();
    byId("delete").onclick = () => this.#delete();
    byId("unlock").onclick = () => this.#unlock();
    document.addEventListener("keydown", (event) => {
      // A dialog or a drawer that is open keeps Escape to itself.
      if (event.key === "Escape" && !document.querySelector("dialog[open], body.drawer")) this.#stop();
    });
    addEventListener("pagehide", () => this.#running.forEach(({ conversation }) => this.#save(conversation)));
    addEventListener("hashchange", () => this.#open(location.hash.slice(1)));
    addEventListener("focus", () => this.#catchUp());
  }

  async #learnModel() {
    this.#model ??= (await this.#server.json("/v1/models")).data[0];
    byId("model").textContent = this.#model.id;
    return this.#model;
  }

  /** It has just begun to answer; it may be another one than before. */
  async #serverIsReady() {
    this.#model = null;
    this.#prices.forget();
    await this.#learnModel().catch(() => {});
    this.#composer.refresh();
  }

  async #askForKey(refused) {
    const given = await askForKey(refused);
    if (given) this.#memory.poll();
    return given;
  }

  /** Any request that is refused asks for the key, until it is right or its owner gives up. */
  async #unlock() {
    await this.#server.json("/v1/models").catch(() => {});
  }

  #blank() {
    return { id: newId(), title: UNTITLED, changed: Date.now(), settings: { ...DEFAULTS }, messages: [] };
  }

  /** Begin a conversation, with the settings of the one at hand. */
  #create() {
    const settings = { ...this.#current.settings };
    this.#show({ ...this.#blank(), settings });
    this.#composer.focus();
  }

  async #open(id) {
    if (id === this.#current.id) return;
    const running = this.#running.get(id)?.conversation;
    this.#show(running ?? (await this.#load(id)) ?? this.#blank());
  }

  /** A conversation as it was kept: by the browser, or where it keeps nothing by this page. */
  async #load(id) {
    const kept = (id && (await this.#store?.load(id))) || this.#conversations.find((one) => one.id === id);
    // The page was left while these answers grew.
    const cut = kept?.messages.filter(({ state }) => state === "waiting" || state === "streaming") ?? [];
    for (const message of cut) message.state = "stopped";
    return kept;
  }

  /** Another tab may have gone on with the conversation at hand. */
  async #catchUp() {
    const { id } = this.#current;
    if (this.#running.has(id)) return;
    const kept = await this.#load(id);
    if (!kept || this.#current.id !== id || this.#running.has(id) || kept.changed <= this.#current.changed) return;
    this.#keepInList(kept);
    this.#show(kept);
  }

  #show(conversation) {
    this.#current = conversation;
    this.#addresses.release();
    this.#transcript.show(conversation);
    this.#settings.show({ ...DEFAULTS, ...conversation.settings });
    this.#refresh();
  }

  /** What stands around the transcript: the list, the title, the buttons. */
  #refresh() {
    const { id, title, messages } = this.#current;
    const empty = messages.length === 0;
    document.body.classList.toggle("empty", empty);
    byId("title").value = empty ? "" : title;
    document.title = empty ? "memphi" : `${title} · memphi`;
    history.replaceState(null, "", empty ? location.pathname : `#${id}`);
    byId("title").disabled = byId("export").disabled = byId("delete").disabled = empty;
    this.#sidebar.show(this.#conversations, id);
    this.#composer.busy = this.#running.has(id);
    if (this.#memory) this.#memory.busy = this.#running.size > 0;
  }

  async #send({ text, attachments }) {
    const conversation = this.#current;
    const question = { role: "user", text, attachments };
    conversation.messages.push(question);
    if (conversation.title === UNTITLED) conversation.title = titleOf(text, attachments);
    this.#transcript.add(question);
    await this.#answer(conversation);
  }

  async #regenerate() {
    const conversation = this.#current;
    if (this.#running.has(conversation.id) || conversation.messages.at(-1)?.role !== "assistant") return;
    this.#transcript.remove(conversation.messages.pop());
    await this.#answer(conversation);
  }

  async #answer(conversation) {
    const controller = new AbortController();
    const message = emptyAnswer();
    const asked = [...conversation.messages];
    const makeBody = async () => bodyOf((await this.#learnModel()).id, conversation.settings, asked);
    let saved = 0;
    const changed = () => {
      this.#transcript.update(message);
      if (Date.now() - saved < SAVE_MS) return;
      saved = Date.now();
      this.#save(conversation);
    };
    conversation.messages.push(message);
    conversation.changed = Date.now();
    this.#running.set(conversation.id, { conversation, controller });
    this.#transcript.add(message);
    this.#transcript.toEnd();
    this.#keepInList(conversation);
    changed();
    this.#refresh();
    await answer(this.#server, makeBody, message, controller.signal, changed);
    this.#running.delete(conversation.id);
    conversation.changed = Date.now();
    await this.#save(conversation);
    this.#refresh();
  }

  #stop() {
    this.#running.get(this.#current.id)?.controller.abort();
  }

  #change(settings) {
    this.#current.settings = settings;
    this.#composer.refresh();
    if (this.#current.messages.length) this.#save(this.#current);
  }

  #rename(title) {
    this.#current.title = title.trim() || this.#current.title;
    this.#keepInList(this.#current);
    this.#save(this.#current);
    this.#refresh();
  }

  #keepInList(conversation) {
    const others = this.#conversations.filter(({ id }) => id !== conversation.id);
    this.#conversations = [conversation, ...others].sort((one, other) => other.changed - one.changed);
  }

  async #save(conversation) {
    if (conversation.deleted) return;
    try {
      await this.#store?.save(conversation);
    } catch {
      byId("unkept").hidden = false;
    }
  }

  async #delete() {
    const conversation = this.#current;
    const { id, title } = conversation;
    const consequence = `“${title}” is kept in this browser only, and will be gone.`;
    if (!(await confirmed("Delete this conversation?", consequence, "Delete"))) return;
    conversation.deleted = true;
    this.#stop();
    await this.#store?.delete(id);
    this.#conversations = this.#conversations.filter((one) => one.id !== id);
    this.#create();
  }

  /** The conversation as JSON: its messages are those that the API takes. */
  async #export() {
    const { title, changed, settings, messages } = this.#current;
    const saved = {
      title,
      changed: new Date(changed).toISOString(),
      model: this.#model?.id ?? null,
      settings,
      messages: await openaiMessages(settings, messages),
    };
    const url = URL.createObjectURL(new Blob([JSON.stringify(saved, null, 2)], { type: "application/json" }));
    const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation";
    h("a", { href: url, download: `${name}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}

function titleOf(text, attachments) {
  const line = text.split("\n")[0].trim() || attachments.map(({ name }) => name).join(", ");
  return line.length > TITLE_LETTERS ? `${line.slice(0, TITLE_LETTERS - 1)}…` : line;
}

new App().start();
