// From a conversation to a request, its price, and its answer.

import { partOf } from "./attachments.js";

/** A picture of one pixel, for pricing what is written: the attachments' own prices are known already. */
const STAND_IN = {
  type: "image_url",
  image_url: {
    url: "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB5Sfe/AAAAABJRU5ErkJggg==",
  },
};

export const DEFAULTS = {
  system: "",
  temperature: 0,
  topP: 1,
  maxTokens: null,
  seed: null,
  detail: "auto",
  onPressure: null,
};

/** What is sent; part makes of an attachment what stands for it. */
export async function bodyOf(model, settings, messages, part = partOf) {
  const body = {
    model,
    messages: await openaiMessages(settings, messages, part),
    temperature: settings.temperature,
    top_p: settings.topP,
    memphi: { on_pressure: settings.onPressure ?? undefined, detail: settings.detail },
  };
  if (settings.maxTokens) body.max_tokens = settings.maxTokens;
  // Without a seed of one's own every answer is drawn anew, so that asking again is worth while.
  if (settings.temperature > 0 || settings.seed !== null)
    body.seed = settings.seed ?? Math.floor(Math.random() * 2 ** 32);
  return body;
}

/** The conversation in OpenAI's words; answers that never came and attachments that are lost are left out. */
export async function openaiMessages(settings, messages, part = partOf) {
  const turns = settings.system.trim() ? [{ role: "system", content: settings.system.trim() }] : [];
  for (const message of messages) {
    const { role, text } = message;
    if (role === "assistant" && !text) continue;
    const attached = attachedTo(message);
    const parts = await Promise.all(attached.map(part));
    // Attachments stand before what is written about them, as the model was trained.
    if (text) parts.push({ type: "text", text });
    turns.push({ role, content: attached.length ? parts : text });
  }
  return turns;
}

const attachedTo = ({ attachments }) => (attachments ?? []).filter(({ blob }) => blob);

/** Prices in tokens, before anything is sent to be answered. */
export class Prices {
  #server;
  #model;
  #known = new Map();

  /** model() resolves to the name to ask for. */
  constructor(server, model) {
    this.#server = server;
    this.#model = model;
  }

  /** What one attachment takes: sent once, then known; throws a Failure for a damaged one. */
  attachment(attachment, { detail, onPressure }) {
    const name = [attachment.id, detail, onPressure].join();
    if (!this.#known.has(name)) {
      const tokens = this.#ask(attachment, { detail, on_pressure: onPressure ?? undefined });
      tokens.catch(() => this.#known.delete(name));
      this.#known.set(name, tokens);
    }
    return this.#known.get(name);
  }

  /** Another model may count otherwise. */
  forget() {
    this.#known.clear();
  }

  /** What is written takes, and what all attachments take; together exactly what the whole does, without sending it. */
  async conversation(settings, messages, signal) {
    const attachments = messages.flatMap(attachedTo);
    const tokens = await Promise.all(attachments.map((one) => this.attachment(one, settings)));
    const body = await bodyOf(await this.#model(), settings, messages, () => STAND_IN);
    const price = await this.#server.json("/v1/tokenize", { body, signal, quiet: true });
    const text = price.prompt_tokens - price.image_tokens;
    const media = tokens.reduce((sum, one) => sum + one, 0);
    return { tokens: text + media, text, media };
  }

  async #ask(attachment, memphi) {
    const messages = [{ role: "user", content: [await partOf(attachment)] }];
    const body = { model: await this.#model(), messages, memphi };
    const { image_tokens, audio_tokens } = await this.#server.json("/v1/tokenize", { body, quiet: true });
    return image_tokens + audio_tokens;
  }
}

/** A message that waits for its answer; state: waiting, streaming, done, stopped or failed. */
export const emptyAnswer = () => ({ role: "assistant", text: "", state: "waiting", notice: null, error: null });

/** Fill a message with the answer to makeBody() as it arrives; calls changed whenever there is more. Never throws. */
export async function answer(server, makeBody, message, signal, changed) {
  try {
    while (!(await attempt(server, makeBody, message, signal, changed)));
    message.state = "done";
  } catch (error) {
    message.state = error.name === "AbortError" ? "stopped" : "failed";
    message.error = error.name === "AbortError" ? null : error.message;
  }
  message.notice = null;
  changed();
}

/** Whether it went through; a server that loads or is busy is waited for. */
async function attempt(server, makeBody, message, signal, changed) {
  try {
    const body = await makeBody();
    for await (const chunk of server.stream("/v1/chat/completions", { body: streamed(body), signal })) {
      take(message, chunk);
      changed();
    }
    return true;
  } catch (error) {
    if (!error.passes) throw error;
    message.notice = `${error.message.split(/[;.]/)[0]}; trying again by itself…`;
    changed();
    await pause(error.retrySeconds, signal);
    return false;
  }
}

const streamed = (body) => ({ ...body, stream: true, stream_options: { include_usage: true } });

function take(message, chunk) {
  const [choice] = chunk.choices ?? [];
  message.text += choice?.delta?.content ?? "";
  message.notice = null;
  if (message.text) message.state = "streaming";
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (chunk.usage) message.usage = chunk.usage;
  if (chunk.memphi?.degraded) message.degraded = chunk.memphi.degraded;
  if (chunk.memphi?.timings) message.timings = chunk.memphi.timings;
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
