// What the search box asks: words in any order, their endings ignored, rarer words count more, headings and keywords more than text.
// smalldocs looks for the query as one string with typing errors; that stays for queries without any hit.
(() => {
  const Fuzzy = window.Fuse, weights = { section: 5, title: 4, keywords: 4, text: 1 };
  const stop = new Set("a an and are as at be by can do does for from how i in is it my of on or that the this to what when where which with without why you your".split(" "));
  const stem = w => w.length < 4 ? w : w.replace(/(ies)$/, "y").replace(/(ations?|ings?|ments?|ed|es|s|e)$/, (m) => w.length - m.length < 3 ? m : "");
  const words = s => (s || "").toLowerCase().split(/[^\p{L}\p{N}+]+/u).filter(Boolean);
  const stems = s => words(s).filter(w => !stop.has(w)).map(stem);
  const counts = list => list.reduce((m, w) => m.set(w, (m.get(w) || 0) + 1), new Map());
  const isApi = e => !/^(index|tutorials|explanations|reproductions)/.test(e.href);

  class Search {
    constructor(entries, options) {
      this.fuzzy = new Fuzzy(entries, options);
      this.rows = entries.map(item => ({ item, ...Object.fromEntries(Object.keys(weights).map(f => [f, counts(stems(item[f]))])) }));
      this.mean = entries.reduce((n, e) => n + words(e.text).length, 0) / entries.length;
    }
    has(row, field, word) { // how often; half for a word that only begins so
      if (row[field].has(word)) return row[field].get(word);
      return word.length > 2 && [...row[field].keys()].some(w => w.startsWith(word)) ? .5 : 0;
    }
    score(row, word) { // BM25 over the fields
      const length = [...row.text.values()].reduce((a, b) => a + b, 0) / this.mean;
      const n = Object.entries(weights).reduce((sum, [f, w]) => sum + w * Math.min(3, this.has(row, f, word)), 0);
      return n / (n + 2 + length);
    }
    search(query, { limit = 20 } = {}) {
      const asked = [...new Set(stems(query))];
      if (!asked.length) return this.fuzzy.search(query, { limit });
      const table = this.rows.map(row => asked.map(w => this.score(row, w)));
      const rarity = asked.map((_, i) => Math.log(1 + this.rows.length / (1 + table.filter(r => r[i]).length)));
      const total = (row, i) => {
        const found = table[i].filter(Boolean).length / asked.length;
        return table[i].reduce((sum, s, j) => sum + s * rarity[j], 0) * found ** 2 * (isApi(row.item) ? 1 : 1.25);
      };
      const hits = this.rows.map((row, i) => ({ item: row.item, score: total(row, i) })).filter(h => h.score).sort((a, b) => b.score - a.score);
      const seen = new Map(), page = h => h.item.href.split("#")[0];
      const few = hits.filter(h => { seen.set(page(h), (seen.get(page(h)) || 0) + 1); return seen.get(page(h)) < 4; });
      return few.length ? few.slice(0, limit) : this.fuzzy.search(query, { limit });
    }
  }
  window.Fuse = Search;
})();
