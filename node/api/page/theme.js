// Light, dark, or as the system has it; the choice is remembered in this browser.

import { find, setText } from "./dom.js";

const KEY = "metaswarm-theme";
const CHOICES = ["system", "light", "dark"];
const button = find("theme");

function apply(choice) {
  if (choice === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  setText(button, `Theme: ${choice}`);
}

let choice = CHOICES.includes(localStorage.getItem(KEY)) ? localStorage.getItem(KEY) : "system";
apply(choice);
button.addEventListener("click", () => {
  choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
  localStorage.setItem(KEY, choice);
  apply(choice);
});
