// Loaded before anything is painted, so that a dark page never flashes white.
document.documentElement.dataset.theme = localStorage.getItem("lorry.theme") ?? "auto";
