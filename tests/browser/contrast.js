// Returns the visible texts whose contrast with the ground behind them is below what WCAG 2.2 AA asks for.
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const luminance = ([red, green, blue]) => {
    const linear = [red, green, blue].map((each) => {
      const share = each / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ratio = (a, b) => {
    const [light, dark] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (light + 0.05) / (dark + 0.05);
  };
  // What is drawn below a text in an SVG, by the class of its own group; elsewhere the first opaque ancestor.
  const groundOf = (element) => {
    const card = element.closest("g")?.querySelector(":scope > .card, :scope > rect.lane, :scope > rect");
    if (card && element instanceof SVGElement && rgba(getComputedStyle(card).fill)[3] === 1) {
      return rgba(getComputedStyle(card).fill);
    }
    for (let each = element; each; each = each.parentElement) {
      const color = rgba(getComputedStyle(each).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const faults = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("script, noscript, title, desc, option")) continue;
    const box = element.getBoundingClientRect();
    if (!element.checkVisibility({ opacityProperty: true }) || box.width <= 1 || element.closest(":disabled")) continue;
    const style = getComputedStyle(element);
    const color = rgba(element instanceof SVGElement ? style.fill : style.color);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const found = ratio(color, groundOf(element));
    if (found < least) faults.push(`${found.toFixed(2)} ${walker.currentNode.textContent.trim().slice(0, 40)}`);
  }
  return faults;
};
