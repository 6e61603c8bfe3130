// Records from the microphone. The browser's own recorder compresses; what is handed on is WAV, which plays everywhere.

import { decoded, wav } from "./sound.js";

const ELSEWHERE =
  "Browsers give the microphone to pages of this machine and over HTTPS only; open localhost, or start memphi serve " +
  "with --tls-cert and --tls-key.";
const REFUSALS = {
  NotAllowedError: "The microphone was refused; allow it for this page in the browser's settings.",
  NotFoundError: "There is no microphone; connect one, or drop a recording here.",
  NotReadableError: "Another program holds the microphone; close it and try again.",
};

export class Recorder {
  #stream;
  #recorder;
  #ended;
  #chunks = [];
  #context;
  #analyser;
  #started = 0;

  /** Ask for the microphone and begin; throws an Error with a sentence. */
  async start() {
    if (!navigator.mediaDevices) throw new Error(ELSEWHERE);
    try {
      this.#stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
      this.#begin();
    } catch (error) {
      this.#letGo();
      throw new Error(REFUSALS[error.name] ?? `The microphone does not work: ${error.message}.`);
    }
  }

  #begin() {
    this.#recorder = new MediaRecorder(this.#stream, { audioBitsPerSecond: 128000 });
    this.#ended = new Promise((resolve) => (this.#recorder.onstop = resolve));
    this.#recorder.ondataavailable = ({ data }) => this.#chunks.push(data);
    this.#recorder.start();
    this.#started = performance.now();
    this.#context = new AudioContext();
    this.#context.resume(); // Some browsers have forgotten the click by now.
    this.#analyser = this.#context.createAnalyser();
    this.#context.createMediaStreamSource(this.#stream).connect(this.#analyser);
  }

  get seconds() {
    return (performance.now() - this.#started) / 1000;
  }

  /** How loud it is now, in [0, 1]. */
  get level() {
    const samples = new Float32Array(this.#analyser.fftSize);
    this.#analyser.getFloatTimeDomainData(samples);
    return Math.min(1, 4 * Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length));
  }

  /** End, and hand the recording over as a WAV file. */
  async finish() {
    this.#stop();
    await this.#ended;
    this.#letGo();
    const samples = await decoded(new Blob(this.#chunks, { type: this.#recorder.mimeType }));
    return new File([wav(samples)], `recording ${timeOfDay()}.wav`, { type: "audio/wav" });
  }

  /** End, and forget what was recorded. */
  discard() {
    this.#stop();
    this.#letGo();
  }

  /** It may have ended by itself, when the microphone was unplugged. */
  #stop() {
    if (this.#recorder.state !== "inactive") this.#recorder.stop();
  }

  #letGo() {
    this.#stream?.getTracks().forEach((track) => track.stop());
    this.#context?.close();
  }
}

const timeOfDay = () => new Date().toTimeString().slice(0, 8).replaceAll(":", ".");
