// Sound as samples: decoded to what the model hears (16 kHz, one channel), written as WAV, drawn as bars.

const RATE = 16000;
const BARS = 44;

/** Samples in [-1, 1] at 16 kHz; throws where the browser knows no such format. */
export async function decoded(blob) {
  const context = new OfflineAudioContext(1, 1, RATE);
  const buffer = await context.decodeAudioData(await blob.arrayBuffer());
  const samples = buffer.getChannelData(0).slice();
  for (let channel = 1; channel < buffer.numberOfChannels; channel++) {
    buffer.getChannelData(channel).forEach((value, index) => (samples[index] += value));
  }
  return samples.map((value) => value / buffer.numberOfChannels);
}

export const secondsOf = (samples) => samples.length / RATE;

/** The same samples as a WAV file of 16-bit integers. */
export function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const name = (offset, letters) =>
    [...letters].forEach((letter, at) => view.setUint8(offset + at, letter.charCodeAt(0)));
  name(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  name(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // Bytes of this part
  view.setUint16(20, 1, true); // Plain integers
  view.setUint16(22, 1, true); // Channels
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true); // Bytes per second
  view.setUint16(32, 2, true); // Bytes per sample
  view.setUint16(34, 16, true); // Bits per sample
  name(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, index) => view.setInt16(44 + 2 * index, Math.max(-1, Math.min(1, value)) * 32767, true));
  return new Blob([view.buffer], { type: "audio/wav" });
}

/** How loud each stretch is, against the loudest: a few numbers in [0, 1] to draw. */
export function peaks(samples) {
  const stretch = Math.max(1, Math.ceil(samples.length / BARS));
  const heights = [];
  for (let start = 0; start < samples.length; start += stretch) {
    let highest = 0;
    for (let at = start; at < Math.min(start + stretch, samples.length); at++) {
      highest = Math.max(highest, Math.abs(samples[at]));
    }
    heights.push(highest);
  }
  const loudest = Math.max(...heights, 0.01);
  return heights.map((height) => height / loudest);
}
