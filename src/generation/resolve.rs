//! From what a request says of its weights to the weights, held until its reply has ended.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};

use super::model_name::ModelName;
use super::{Access, AdapterEntry, AdapterField, AdapterRef, Generation, GenerationError, Selection};
use crate::adapter::canonical::{Adapter, Member};
use crate::adapter::registry::{AcquireError, AdapterStatus, Phase};
use crate::metrics::{BASE, COMPOSITION};

/// The weights a request was promised, under the names its reply uses. They stay in memory for as long as it lives.
#[derive(Debug, Clone)]
pub struct ResolvedModel {
    pub id: String,
    /// What the engine applies; `None` is the base alone.
    pub adapter: Option<Arc<Adapter>>,
    /// What `adapter` is made of.
    pub applied: Vec<Member>,
}

impl ResolvedModel {
    /// A registered name, or one for the base and one for all compositions.
    pub(super) fn metric_label(&self) -> &str {
        match self.applied.as_slice() {
            [] => BASE,
            [only] => &only.name,
            _ => COMPOSITION,
        }
    }
}

/// An adapter that a request names, known to its caller.
struct Wanted {
    param: String,
    name: String,
    scale: f32,
}

impl Generation {
    /// The model under which clients find an adapter.
    pub fn model_id(&self, adapter: &str) -> String {
        format!("{}-{adapter}", self.base.id)
    }

    /// Names of the configuration that stand for a model that `access` shows.
    pub fn visible_aliases(&self, access: &Access) -> impl Iterator<Item = (&str, Option<AdapterStatus>)> {
        let aliases = self.config.server.model_aliases.keys();
        aliases.filter_map(|alias| self.find_model(alias, access).ok().map(|model| (alias.as_str(), model)))
    }

    /// What `name` means to a caller, to whom hidden adapters are not there.
    fn read_name<'a>(&'a self, name: Option<&'a str>, access: &Access) -> ModelName<'a> {
        let name = name.map(|name| self.config.server.model_aliases.get(name).map_or(name, String::as_str));
        let is_adapter = |name: &str| access.allows(name) && self.adapters.status(name).is_some();
        ModelName::parse(name, &self.base.id, is_adapter)
    }

    /// Every adapter that `access` shows, servable or not, in order of the names.
    pub fn visible_adapters(&self, access: &Access) -> Vec<AdapterStatus> {
        let mut adapters = self.adapters.list();
        adapters.retain(|adapter| access.allows(&adapter.name));
        adapters
    }

    /// Those of them that were not refused.
    pub fn servable_adapters(&self, access: &Access) -> impl Iterator<Item = AdapterStatus> + use<> {
        self.visible_adapters(access).into_iter().filter(|adapter| adapter.phase != Phase::Failed)
    }

    /// What is known of the model `name`, without loading it; `None` is the base.
    ///
    /// # Errors
    /// [`GenerationError::UnknownModel`]; nothing falls back to the base.
    pub fn find_model(&self, name: &str, access: &Access) -> Result<Option<AdapterStatus>, GenerationError> {
        match self.read_name(Some(name), access) {
            ModelName::Base => Ok(None),
            ModelName::Adapter(adapter) => self.find_adapter("model", name, adapter, access).map(Some),
        }
    }

    /// Finds the weights and loads what is not in memory.
    ///
    /// # Errors
    /// An adapter that is not there or was refused, a contradiction, or no memory; nothing falls back to the base.
    pub async fn resolve(&self, selection: &Selection, access: &Access) -> Result<ResolvedModel, GenerationError> {
        let mut wanted = self.wanted(selection, access)?;
        // At strength 0 an adapter changes nothing, and the base is not multiplied by it.
        wanted.retain(|adapter| adapter.scale != 0.0);
        let members: Vec<_> = wanted.iter().map(|adapter| (adapter.name.clone(), adapter.scale)).collect();
        let field = selection.adapters.as_ref().map_or("model", |field| field.name);
        let composed = self.adapters.compose(&members).await;
        let adapter = composed.map_err(|error| acquire_error(error, &wanted, field))?;
        let applied = adapter.as_ref().map_or(Vec::new(), |adapter| adapter.members());
        let names: Vec<_> = applied.iter().map(|adapter| adapter.name.as_str()).collect();
        let id = if names.is_empty() { self.base.id.clone() } else { self.model_id(&names.join("+")) };
        Ok(ResolvedModel { id, adapter, applied })
    }

    fn wanted(&self, selection: &Selection, access: &Access) -> Result<Vec<Wanted>, GenerationError> {
        let model = match self.read_name(selection.model.as_deref(), access) {
            ModelName::Base => None,
            ModelName::Adapter(name) => {
                let model = selection.model.as_deref().unwrap_or_default();
                Some(self.find_adapter("model", model, name, access)?.name)
            }
        };
        let Some(field) = &selection.adapters else {
            return match model {
                Some(name) => Ok(vec![Wanted { param: "model".to_owned(), name, scale: 1.0 }]),
                None => self.wanted_by_default(access),
            };
        };
        let wanted = self.wanted_by_entries(&field.entries, access)?;
        match model {
            Some(model) if !matches!(wanted.as_slice(), [only] if only.name == model) => {
                let message = format!(
                    "`model` asks for the adapter `{model}` and `{}` for something else: name the base as the model, or \
                     leave `{}` out",
                    field.name, field.name
                );
                Err(GenerationError::InvalidSelection { param: field.name.to_owned(), message })
            }
            _ => Ok(wanted),
        }
    }

    fn wanted_by_entries(&self, entries: &[AdapterEntry], access: &Access) -> Result<Vec<Wanted>, GenerationError> {
        let mut names = HashSet::new();
        let wanted = entries.iter().map(|AdapterEntry { param, adapter, scale }| {
            let name = self.find_entry(param, adapter, access)?.name;
            if !names.insert(name.clone()) {
                let message = format!("`{param}` names the adapter `{name}` a second time");
                return Err(GenerationError::InvalidSelection { param: param.clone(), message });
            }
            Ok(Wanted { param: param.clone(), name, scale: *scale })
        });
        wanted.collect()
    }

    /// The server's own choice for the base, as far as the caller may know of it.
    fn wanted_by_default(&self, access: &Access) -> Result<Vec<Wanted>, GenerationError> {
        let is_there = |name: &str| access.allows(name) && self.adapters.status(name).is_some();
        let wanted = self.default_scales().into_iter().filter(|(name, _)| is_there(name)).map(|(name, scale)| {
            self.find_adapter("model", &name, &name, access)?;
            Ok(Wanted { param: "model".to_owned(), name, scale })
        });
        wanted.collect()
    }

    fn find_entry(&self, param: &str, adapter: &AdapterRef, access: &Access) -> Result<AdapterStatus, GenerationError> {
        match adapter {
            AdapterRef::Name(model) => {
                let name = match self.read_name(Some(model), access) {
                    ModelName::Base => model,
                    ModelName::Adapter(name) => name,
                };
                self.find_adapter(param, model, name, access)
            }
            AdapterRef::Id(id) => {
                let adapter = self.visible_adapters(access).into_iter().find(|adapter| adapter.id == *id);
                let adapter = adapter.ok_or_else(|| GenerationError::unknown_model(param, &id.to_string()))?;
                self.find_adapter(param, &adapter.name, &adapter.name, access)
            }
        }
    }

    /// The adapter `name`, which the client calls `model`.
    fn find_adapter(
        &self,
        param: &str,
        model: &str,
        name: &str,
        access: &Access,
    ) -> Result<AdapterStatus, GenerationError> {
        let status = access.allows(name).then(|| self.adapters.status(name)).flatten();
        let status = status.ok_or_else(|| GenerationError::unknown_model(param, model))?;
        match status.refusal() {
            Some(cause) => Err(refused(param, model, cause)),
            None => Ok(status),
        }
    }

    /// Names and strengths of the adapters that a request to the base gets when it says nothing of adapters.
    pub fn default_scales(&self) -> Vec<(String, f32)> {
        self.default_scales.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces them, after making sure that they can be applied together.
    ///
    /// # Errors
    /// As of [`Generation::resolve`]; then nothing has changed.
    pub async fn set_default_scales(&self, entries: Vec<AdapterEntry>) -> Result<(), GenerationError> {
        let field = AdapterField { name: "scale", entries };
        let selection = Selection { model: None, adapters: Some(field) };
        let applied = self.resolve(&selection, &Access::All).await?.applied;
        let scales = applied.into_iter().map(|adapter| (adapter.name, adapter.scale)).collect();
        *self.default_scales.write().unwrap_or_else(PoisonError::into_inner) = scales;
        Ok(())
    }
}

fn refused(param: &str, model: &str, cause: &str) -> GenerationError {
    let hint = format!("the adapter was refused when the server loaded it: {cause}");
    GenerationError::UnknownModel { param: param.to_owned(), model: model.to_owned(), hint }
}

fn acquire_error(error: AcquireError, wanted: &[Wanted], field: &str) -> GenerationError {
    let param = |name: &str| {
        let named = wanted.iter().find(|adapter| adapter.name == name);
        named.map_or(field, |adapter| adapter.param.as_str())
    };
    match error {
        AcquireError::Unknown(name) => GenerationError::unknown_model(param(&name), &name),
        AcquireError::Refused { name, cause } => refused(param(&name), &name, &cause),
        AcquireError::Composition(message) => GenerationError::InvalidSelection { param: field.to_owned(), message },
        AcquireError::OutOfMemory(_) => GenerationError::OutOfMemory(error.to_string()),
        AcquireError::Unreadable { .. } => GenerationError::UnreadableAdapter(error.to_string()),
    }
}
