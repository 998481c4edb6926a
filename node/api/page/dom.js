// Small helpers for building and updating the document. Texts only ever become text nodes, never HTML.

const SVG = "http://www.w3.org/2000/svg";

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Return an HTML element. */
export function el(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

/** Return an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

export const find = (id) => document.getElementById(id);

/** Set an element's text, unless it is that already: an untouched node keeps selections and screen readers calm. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Make the children of an element those of the items, in order, and keep the nodes of items that stay.
 * `create(item)` returns a node, `update(node, item)` fills it.
 */
export function reconcile(parent, items, keyOf, create, update) {
  const nodes = (parent.nodesByKey ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, node] of nodes) {
    if (!wanted.has(key)) {
      node.remove();
      nodes.delete(key);
    }
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let node = nodes.get(key);
    if (!node) {
      node = create(item);
      nodes.set(key, node);
    }
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
    update(node, item);
  }
}

/** Return a function that renders only when its document has changed. */
export function onChange(render) {
  let last;
  return (document_, ...rest) => {
    const text = JSON.stringify([document_, ...rest]);
    if (text !== last) {
      last = text;
      render(document_, ...rest);
    }
  };
}

/** Tell a screen reader. */
export function announce(text) {
  setText(find("announcer"), text);
}

/** Return a line with a command and a button that copies it. */
export function commandLine(command) {
  const code = el("code", {}, command);
  const button = el("button", { type: "button" });
  const show = (text, name) => {
    setText(button, text);
    button.setAttribute("aria-label", name);
  };
  button.addEventListener("click", async () => {
    if (await copy(command, code)) show("Copied", "Copied");
    else show("Press Ctrl+C", "The command is selected: press Control and C");
    setTimeout(() => show("Copy", `Copy the command ${command}`), 2000);
  });
  show("Copy", `Copy the command ${command}`);
  return el("div", { class: "command" }, code, button);
}

async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without a clipboard (plain HTTP on another machine) the text is selected for the user to copy.
    getSelection().selectAllChildren(node);
    return document.execCommand("copy");
  }
}
