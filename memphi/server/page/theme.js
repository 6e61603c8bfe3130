// Sets the theme before anything is painted; no module, because those run too late for that.
try {
  const theme = localStorage.getItem("memphi.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // This browser keeps nothing.
}
