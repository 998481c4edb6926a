// Returns what a screen reader could not name or find: controls and pictures without a name, and missing landmarks.
() => {
  const faults = [];
  const textOf = (id) => document.getElementById(id)?.textContent.trim() ?? "";
  const nameOf = (element) => {
    const by = element.getAttribute("aria-labelledby")?.split(" ").map(textOf).join(" ").trim();
    const labels = [...(element.labels ?? [])].map((label) => label.textContent.trim()).join(" ");
    const text = element.matches("input, select, textarea") ? "" : element.textContent.trim();
    return by || element.getAttribute("aria-label") || labels || text;
  };
  for (const element of document.querySelectorAll("button, a, input, select, textarea, dialog, [role=region], [role=img], [role=log], section, aside, nav")) {
    if (!nameOf(element)) faults.push(`no name: ${element.outerHTML.slice(0, 80)}`);
  }
  for (const svg of document.querySelectorAll("svg")) {
    if (svg.getAttribute("role") !== "img" && !svg.closest("[aria-hidden=true]")) faults.push("a picture without a role");
  }
  for (const image of document.images) if (!image.hasAttribute("alt")) faults.push(`no alt: ${image.src}`);
  for (const [selector, least] of [["main", 1], ["h1", 1], ["body > header", 1], ["aside", 1], ["nav", 1], ["[role=status]", 1]]) {
    if (document.querySelectorAll(selector).length < least) faults.push(`missing: ${selector}`);
  }
  if (!document.documentElement.lang) faults.push("no language");
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of new Set(ids.filter((each, index) => ids.indexOf(each) !== index))) faults.push(`id twice: ${id}`);
  for (const cell of document.querySelectorAll("th")) if (!cell.scope) faults.push(`no scope: ${cell.textContent}`);
  const levels = [...document.querySelectorAll("h1, h2, h3")].filter((each) => each.checkVisibility()).map((each) => Number(each.tagName[1]));
  levels.forEach((level, index) => {
    if (index && level > levels[index - 1] + 1) faults.push(`a heading of level ${level} after ${levels[index - 1]}`);
  });
  for (const element of document.querySelectorAll("[tabindex]")) if (element.tabIndex > 0) faults.push("a tabindex above 0");
  return faults;
};
