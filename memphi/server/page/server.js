// Speaks to the server that sent this page: its key, its refusals as one sentence each, its streams of events.

import { tried } from "./dom.js";

const KEY = "memphi.key";
const LOST = "The connection was lost in the middle of the answer; try again.";

/** A refusal: the message is one sentence for a person, the status is HTTP's, 0 where nobody answered. */
export class Failure extends Error {
  constructor(message, { status = 0, param = null, retrySeconds = 2 } = {}) {
    super(message);
    Object.assign(this, { status, param, retrySeconds });
  }

  /** Whether the same request may work a little later. */
  get passes() {
    return this.status === 503 || this.status === 429;
  }
}

/** The key where the browser keeps nothing; it is gone with the page. */
let unkept = null;

/** The API key: kept until the tab is closed, or on this device where its owner says so. */
export const key = {
  get: () => tried(() => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY)) ?? unkept,
  set(value, remember) {
    key.forget();
    unkept = tried(() => (remember ? localStorage : sessionStorage).setItem(KEY, value), value);
  },
  forget() {
    unkept = null;
    tried(() => sessionStorage.removeItem(KEY));
    tried(() => localStorage.removeItem(KEY));
  },
};

export class Server {
  #askForKey;
  #asking = null;

  /** askForKey(refused) shows a dialog and resolves to whether a key was given. */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  async json(path, options) {
    return (await this.#send(path, options)).json();
  }

  /** The chunks of an answer as they arrive; leaving the loop or the signal ends it. */
  async *stream(path, options) {
    const response = await this.#send(path, options);
    try {
      yield* eventsOf(response.body);
    } catch (error) {
      throw error instanceof TypeError ? new Failure(LOST) : error; // So fetch calls a connection that breaks.
    }
  }

  /** Ask for the key; who asks while the dialog stands open waits for the same answer. */
  #unlock() {
    this.#asking ??= this.#askForKey(Boolean(key.get())).finally(() => (this.#asking = null));
    return this.#asking;
  }

  /** quiet: fail with 401 rather than ask for the key. */
  async #send(path, { body, signal, quiet = false } = {}) {
    const used = key.get();
    const response = await reach(path, body, used, signal);
    if (response.ok) return response;
    const failure = await refusal(response);
    if (response.status !== 401 || quiet) throw failure;
    if (key.get() === used && !(await this.#unlock())) throw failure;
    return this.#send(path, { body, signal });
  }
}

async function reach(path, body, apiKey, signal) {
  const headers = {};
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  if (body) headers["Content-Type"] = "application/json";
  const init = { headers, signal, cache: "no-store", referrerPolicy: "no-referrer" };
  if (body) Object.assign(init, { method: "POST", body: JSON.stringify(body) });
  try {
    return await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer; see whether memphi serve still runs, then try again.");
  }
}

async function refusal(response) {
  const told = await response.json().catch(() => null);
  const error = told?.error ?? {};
  return new Failure(sentence(error.message ?? `The server answered ${response.status}`), {
    status: response.status,
    param: error.param ?? null,
    retrySeconds: Number(response.headers.get("Retry-After")) || 2,
  });
}

/** A text as a sentence: with a capital, and an end. */
export function sentence(text) {
  const trimmed = text.trim();
  const whole = /[.!?…]$/.test(trimmed) ? trimmed : `${trimmed}.`;
  return whole[0].toUpperCase() + whole.slice(1);
}

/** The JSON of server-sent events, to [DONE]; a stream that ends before it was cut. */
async function* eventsOf(body) {
  let left = "";
  for await (const text of textOf(body)) {
    const blocks = (left + text).split(/\r?\n\r?\n/);
    left = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield eventOf(data);
    }
  }
  throw new Failure(LOST);
}

function eventOf(data) {
  const event = JSON.parse(data);
  if (event.error) throw new Failure(sentence(event.error.message), { status: 500, param: event.error.param });
  return event;
}

/** What a stream of bytes says; not every browser iterates streams by itself. */
async function* textOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) yield read.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
