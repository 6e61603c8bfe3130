// Conversations in this browser (IndexedDB). Nothing of them is kept anywhere else.
//
// A conversation is {id, title, changed, settings, messages}; a message is {role, text, attachments, …}. Blobs lie in a
// store of their own, so that an answer that grows rewrites no pictures.

const NAME = "memphi";

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const finished = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });

export class Store {
  #database;
  #kept = new Set();

  /** Open it, and make it where there is none; throws where the browser keeps nothing (some private windows). */
  static async open() {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("blobs", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    const store = new Store();
    store.#database = await settled(request);
    return store;
  }

  /** All conversations, the latest first, without their attachments' contents. */
  async list() {
    const all = await settled(this.#database.transaction("conversations").objectStore("conversations").getAll());
    return all.sort((one, other) => other.changed - one.changed);
  }

  /** One conversation with all that is attached to it, as far as it is there; undefined where there is none. */
  async load(id) {
    const transaction = this.#database.transaction(["conversations", "blobs"]);
    const conversation = await settled(transaction.objectStore("conversations").get(id));
    const blobs = await settled(transaction.objectStore("blobs").index("conversation").getAll(id));
    const blobOf = new Map(blobs.map((entry) => [entry.id, entry.blob]));
    blobs.forEach((entry) => this.#kept.add(entry.id));
    for (const attachment of attachmentsOf(conversation)) attachment.blob = blobOf.get(attachment.id);
    return conversation;
  }

  async save(conversation) {
    const transaction = this.#database.transaction(["conversations", "blobs"], "readwrite");
    const blobs = transaction.objectStore("blobs");
    const fresh = attachmentsOf(conversation).filter(({ id, blob }) => blob && !this.#kept.has(id));
    for (const { id, blob } of fresh) blobs.put({ id, conversation: conversation.id, blob });
    transaction.objectStore("conversations").put(withoutBlobs(conversation));
    await finished(transaction);
    fresh.forEach(({ id }) => this.#kept.add(id));
  }

  async delete(id) {
    const transaction = this.#database.transaction(["conversations", "blobs"], "readwrite");
    transaction.objectStore("conversations").delete(id);
    const blobs = transaction.objectStore("blobs");
    for (const key of await settled(blobs.index("conversation").getAllKeys(id))) blobs.delete(key);
    await finished(transaction);
  }
}

const attachmentsOf = (conversation) => conversation?.messages.flatMap((message) => message.attachments ?? []) ?? [];

function withoutBlobs(conversation) {
  const messages = conversation.messages.map((message) => ({
    ...message,
    attachments: message.attachments?.map(({ blob, ...rest }) => rest),
  }));
  return { ...conversation, messages };
}
