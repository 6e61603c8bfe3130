// Pictures and recordings: from a file to an attachment, from an attachment to a part of a message.
//
// An attachment is plain data, as the store keeps it:
//   {id, kind: "image" | "audio", name, type, blob, seconds, peaks}
// seconds and peaks are those of a recording that the browser can decode itself; blob is missing where it was lost.

import { newId } from "./dom.js";
import { decoded, peaks, secondsOf } from "./sound.js";

const SUFFIXES = {
  image: { png: "png", jpg: "jpeg", jpeg: "jpeg", webp: "webp", gif: "gif", tif: "tiff", tiff: "tiff", bmp: "bmp" },
  audio: {
    wav: "wav",
    mp3: "mpeg",
    flac: "flac",
    m4a: "mp4",
    aac: "aac",
    ogg: "ogg",
    oga: "ogg",
    opus: "ogg",
    webm: "webm",
  },
};
export const ACCEPTED = Object.values(SUFFIXES)
  .flatMap((kind) => Object.keys(kind).map((suffix) => `.${suffix}`))
  .join();

const DRAWN_BYTES = 32 * 2 ** 20;
const UNHEARD = { seconds: null, peaks: null };

const suffixOf = (name) => name.toLowerCase().split(".").pop();

function typeOf(file) {
  for (const [kind, types] of Object.entries(SUFFIXES)) {
    const subtype = types[suffixOf(file.name)];
    if (subtype) return { kind, type: `${kind}/${subtype}` };
  }
  const [kind] = file.type.split("/");
  return kind === "image" || kind === "audio" ? { kind, type: file.type } : null;
}

/** An attachment of a file; throws an Error with a sentence for what is no picture and no recording. */
export async function attachmentOf(file) {
  const known = typeOf(file);
  const name = file.name || "attachment";
  if (!known) {
    const works = "PNG, JPEG, WebP, GIF, TIFF, BMP, WAV, MP3, FLAC, M4A, OGG and WebM work";
    throw new Error(`${name} is neither a picture nor a recording; ${works}.`);
  }
  if (!file.size) throw new Error(`${name} is empty.`);
  const blob = new Blob([await file.arrayBuffer()], { type: known.type });
  const attachment = { id: newId(), name, ...known, blob };
  return known.kind === "audio" ? { ...attachment, ...(await soundOf(blob)) } : attachment;
}

/** Length and shape of a recording; null where only the server can decode it, and of one too long for that. */
async function soundOf(blob) {
  if (blob.size > DRAWN_BYTES) return UNHEARD;
  try {
    const samples = await decoded(blob);
    return { seconds: secondsOf(samples), peaks: peaks(samples) };
  } catch {
    return UNHEARD;
  }
}

/** The files that a drop or a paste brings. */
export const filesOf = (transfer) => [...(transfer?.files ?? [])];

/** The attachment as a part of an OpenAI message. */
export async function partOf(attachment) {
  const uri = await dataUri(attachment.blob);
  if (attachment.kind === "image") return { type: "image_url", image_url: { url: uri } };
  return { type: "input_audio", input_audio: { data: uri.slice(uri.indexOf(",") + 1), format: formatOf(attachment) } };
}

function formatOf({ type }) {
  const subtype = type.split("/")[1].replace(/^x-/, "");
  return { mpeg: "mp3", mp4: "m4a", wave: "wav" }[subtype] ?? subtype;
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The attachment can no longer be read; add it again."));
    reader.readAsDataURL(blob);
  });
}

/** Addresses under which the page shows blobs, until they are released. */
export class Addresses {
  #urls = new Map();

  /** null for an attachment whose content is lost. */
  of(attachment) {
    if (!attachment.blob) return null;
    if (!this.#urls.has(attachment.id)) this.#urls.set(attachment.id, URL.createObjectURL(attachment.blob));
    return this.#urls.get(attachment.id);
  }

  release() {
    this.#urls.forEach((url) => URL.revokeObjectURL(url));
    this.#urls.clear();
  }
}
