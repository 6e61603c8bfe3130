// The strip that stands in the composer's place while the microphone records.

import { byId, clock, h } from "./dom.js";
import { Recorder } from "./recorder.js";

const BARS = 48;
const TICK_MS = 80;

export class Recording {
  #recorder = null;
  #timer = null;
  #add;
  #report;

  /** add(file) takes a finished recording, report(sentence) what went wrong. */
  constructor({ add, report }) {
    this.#add = add;
    this.#report = report;
    byId("record").onclick = () => this.#start();
    byId("recording-done").onclick = () => this.#finish();
    byId("recording-discard").onclick = () => this.#end().discard();
    byId("recording").onkeydown = (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.#end().discard();
    };
  }

  async #start() {
    this.#report("");
    const recorder = new Recorder();
    byId("record").disabled = true;
    try {
      await recorder.start();
    } catch (error) {
      this.#report(error.message);
      return;
    } finally {
      byId("record").disabled = false;
    }
    this.#recorder = recorder;
    this.#show(true);
    byId("recording-done").focus();
    const meter = byId("meter");
    meter.replaceChildren(...Array.from({ length: BARS }, () => h("i")));
    this.#timer = setInterval(() => {
      byId("recording-time").textContent = clock(recorder.seconds);
      meter.append(meter.firstChild);
      meter.lastChild.style.height = `${Math.round(8 + 92 * recorder.level)}%`;
    }, TICK_MS);
  }

  async #finish() {
    const recorder = this.#end();
    try {
      this.#add(await recorder.finish());
    } catch {
      this.#report("Nothing was recorded; record for a second at least.");
    }
  }

  #end() {
    const recorder = this.#recorder;
    this.#recorder = null;
    clearInterval(this.#timer);
    this.#show(false);
    byId("text").focus();
    return recorder;
  }

  #show(shown) {
    byId("recording").hidden = !shown;
    byId("composer").classList.toggle("is-recording", shown);
  }
}
