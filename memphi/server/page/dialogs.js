// Two questions that stop everything else: for the server's key, and whether something is meant.

import { byId } from "./dom.js";
import { key } from "./server.js";

/** Ask for the API key; resolves to whether one was given. */
export function askForKey(refused) {
  const form = byId("key-form");
  byId("key-reason").textContent = refused
    ? "The server refused this key. Ask whoever runs it for another."
    : "This server answers only who has its key. Whoever runs it can tell you.";
  form.elements.key.value = "";
  return asked(byId("key-dialog"), form, () => {
    const value = form.elements.key.value.trim();
    if (value) key.set(value, form.elements.remember.checked);
    return Boolean(value);
  });
}

/** Whether something is meant that cannot be undone. */
export function confirmed(question, consequence, verb) {
  byId("confirm-question").textContent = question;
  byId("confirm-consequence").textContent = consequence;
  byId("confirm-yes").textContent = verb;
  return asked(byId("confirm-dialog"), byId("confirm-form"), () => true);
}

/** Show a dialog until its form is sent (what yes() tells) or left in any way (false). */
function asked(dialog, form, yes) {
  return new Promise((resolve) => {
    let result = false;
    form.onsubmit = (event) => {
      event.preventDefault();
      result = yes();
      dialog.close();
    };
    form.querySelector("[data-cancel]").onclick = () => dialog.close();
    dialog.onclose = () => resolve(result);
    dialog.showModal();
  });
}
