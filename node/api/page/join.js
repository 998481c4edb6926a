// The dialog with the commands with which another node joins.

import { getJson } from "./api.js";
import { commandLine, el, find } from "./dom.js";

const dialog = find("join-dialog");

async function fill() {
  const box = find("join-commands");
  try {
    const { here, elsewhere } = await getJson("/swarm/join");
    const none = "Other machines cannot reach this node: start it with --listen /ip4/0.0.0.0/tcp/4001.";
    box.replaceChildren(
      el("h3", {}, "From another machine"), elsewhere ? commandLine(elsewhere) : el("p", {}, none),
      el("h3", {}, "From this machine"), here ? commandLine(here) : el("p", {}, "The node is still starting."));
  } catch (error) {
    box.replaceChildren(el("p", { class: "bad" }, error.message));
  }
}

find("join").addEventListener("click", async () => {
  await fill();
  dialog.showModal();
  dialog.querySelector("button").focus();
});
