// The models and example stores that arms choose from.

import { get } from "./api.js";

export const catalogue = {
  /** OpenAI's cards: the base first, then the adapters. */
  models: [],
  /** The example stores: `{name, num_examples}`. */
  stores: [],

  card(id) {
    return this.models.find((model) => model.id === id);
  },
  store(name) {
    return this.stores.find((store) => store.name === name);
  },
  get base() {
    return this.models[0];
  },
};

/** A server may have no example stores; one without models cannot be used. */
export async function loadCatalogue() {
  const [models, stores] = await Promise.all([get("/v1/models"), get("/v1/icl").catch(() => ({ data: [] }))]);
  catalogue.models = models.data;
  catalogue.stores = stores.data;
}
