//! Which linear layers of the base a PEFT configuration names, by PEFT's own matching rules.
//!
//! Paths are Hugging Face module paths without PEFT's prefix, e.g. `model.layers.3.self_attn.q_proj`.

use std::collections::BTreeSet;

use kernels::shape::Experts;

use super::error::AdapterError;
use super::path_pattern::PathPattern;
use super::tensor_names::TEXT_MODEL;
use crate::model::spec::{FusedExperts, ModelSpec, Module};

/// One adapted linear layer: decoder layer and module.
pub type Site = (usize, Module);

/// Hugging Face path of the embedding.
pub const EMBEDDING_PATH: &str = "model.embed_tokens";
/// Hugging Face path of the output head.
pub const HEAD_PATH: &str = "lm_head";

/// What of the base a configuration names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Targets {
    pub sites: BTreeSet<Site>,
    pub embedding: bool,
    pub head: bool,
}

impl Targets {
    /// # Errors
    /// When these are not exactly `found`, what the file holds; names one that differs.
    pub fn check_found(&self, found: &Self) -> Result<(), AdapterError> {
        let (expected, found) = (self.paths(), found.paths());
        if let Some(path) = expected.difference(&found).next() {
            return Err(AdapterError::Sites(format!(
                "the file holds {} of the {} sites that adapter_config.json names: {path} is missing",
                expected.intersection(&found).count(),
                expected.len(),
            )));
        }
        match found.difference(&expected).next() {
            Some(path) => Err(AdapterError::Sites(format!(
                "the file holds the site {path}, which adapter_config.json does not name"
            ))),
            None => Ok(()),
        }
    }

    fn paths(&self) -> BTreeSet<String> {
        let ends = [(self.embedding, EMBEDDING_PATH), (self.head, HEAD_PATH)];
        let ends = ends.into_iter().filter(|(is_there, _)| *is_there).map(|(_, path)| path.to_string());
        self.sites.iter().map(|&(layer, module)| module_path(layer, module)).chain(ends).collect()
    }
}

/// The path that a site's tensors are kept under, which is Hugging Face's of a Llama: see [`ModelSpec::module_path`] for that of
/// the base.
pub fn module_path(layer: usize, module: Module) -> String {
    format!("model.layers.{layer}.{}.{}", module.parent(), module.name())
}

/// Hugging Face's path of the module that holds all experts of a block.
pub fn experts_path(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.experts")
}

/// What `target_parameters` can name: every linear layer's weight, and the fused weights of experts; paths, and the sites that
/// each is of.
fn parameters(spec: &ModelSpec) -> impl Iterator<Item = (String, Vec<Site>)> {
    let is_fused = |module: &Module| matches!(module, Module::Expert(..));
    let of_layer = move |layer| {
        let weights = spec.modules().filter(move |module| !is_fused(module));
        let weights =
            weights.map(move |module| (format!("{}.weight", spec.module_path(layer, module)), vec![(layer, module)]));
        let fused = spec.features.experts.into_iter().flat_map(move |Experts { count, .. }| {
            FusedExperts::ALL.map(|fused| {
                let of_expert = |expert| {
                    fused.projections().iter().map(move |projection| (layer, Module::Expert(expert, *projection)))
                };
                let path = format!("{}.{}", experts_path(layer), fused.name());
                (path, (0..count).flat_map(of_expert).collect())
            })
        });
        weights.chain(fused)
    };
    (0..spec.num_layers).flat_map(of_layer)
}

/// Modules given by name or by one pattern.
#[derive(Debug)]
pub enum PathMatch {
    /// A path matches by equality or by ending in `.name`.
    Names(Vec<String>),
    /// Matches whole paths.
    Pattern(PathPattern),
}

impl PathMatch {
    fn matches(&self, path: &str) -> Result<bool, AdapterError> {
        let within = in_multimodal(path);
        match self {
            Self::Pattern(pattern) => Ok(pattern.is_match(path)? || pattern.is_match(&within)?),
            Self::Names(names) => Ok(names.iter().any(|name| is_ending(path, name) || is_ending(&within, name))),
        }
    }

    /// A module listed by its full path is adapted whatever `layers_to_transform` says.
    fn names_exactly(&self, path: &str) -> bool {
        match self {
            Self::Pattern(_) => true,
            Self::Names(names) => names.iter().any(|name| name == path),
        }
    }
}

/// The path in a model that sees images too, whose part for text is the base: Gemma 3's are trained within it.
fn in_multimodal(path: &str) -> String {
    path.replacen("model.", &format!("model.{TEXT_MODEL}."), 1)
}

/// Whether a path is this, or ends in it behind a dot.
fn is_ending(path: &str, ending: &str) -> bool {
    path.strip_suffix(ending).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// `target_modules`, `target_parameters`, `exclude_modules`, `layers_to_transform` and `layers_pattern` of a configuration.
#[derive(Debug)]
pub struct SiteSelector {
    pub targets: PathMatch,
    /// Names of parameters, which nothing narrows.
    pub parameters: Vec<String>,
    pub excluded: Option<PathMatch>,
    /// `None` is every layer.
    pub layers: Option<BTreeSet<usize>>,
    /// What the layer list is called in a module path; empty accepts any name. The first group is the layer's number.
    pub layer_patterns: Vec<PathPattern>,
}

impl SiteSelector {
    /// What of the base the configuration names.
    ///
    /// # Errors
    /// When it names nothing, or a layer that the base does not have.
    pub fn targets(&self, spec: &ModelSpec) -> Result<Targets, AdapterError> {
        if let Some(layer) = self.layers.iter().flatten().find(|&&layer| layer >= spec.num_layers) {
            let reason = format!("layer {layer} is no site of the base, which has {} layers", spec.num_layers);
            return Err(AdapterError::field("layers_to_transform", reason));
        }
        let mut targets = Targets {
            sites: BTreeSet::new(),
            embedding: self.selects(EMBEDDING_PATH)?,
            head: self.selects(HEAD_PATH)?,
        };
        for (layer, module) in (0..spec.num_layers).flat_map(|layer| spec.modules().map(move |module| (layer, module)))
        {
            if self.selects(&spec.module_path(layer, module))? {
                targets.sites.insert((layer, module));
            }
        }
        let parameters: Vec<(String, Vec<Site>)> =
            if self.parameters.is_empty() { Vec::new() } else { parameters(spec).collect() };
        for name in &self.parameters {
            let mut named = parameters.iter().filter(|(path, _)| is_ending(path, name)).peekable();
            if named.peek().is_none() {
                let reason = format!("{name:?} is no parameter of the base's linear layers or experts");
                return Err(AdapterError::field("target_parameters", reason));
            }
            targets.sites.extend(named.flat_map(|(_, sites)| sites));
        }
        if targets == Targets::default() {
            return Err(AdapterError::Sites(
                "adapter_config.json names no site of the base: target_modules (with target_parameters, exclude_modules, \
                 layers_to_transform and layers_pattern) fits none of its linear layers; was it trained on another base?"
                    .to_string(),
            ));
        }
        Ok(targets)
    }

    /// The path that rank and alpha of a site are looked up by: that of its weight where `target_parameters` names it.
    pub fn named_path(&self, spec: &ModelSpec, (layer, module): Site) -> String {
        let path = spec.module_path(layer, module);
        let weight = format!("{path}.weight");
        if self.parameters.iter().any(|name| is_ending(&weight, name)) { weight } else { path }
    }

    fn selects(&self, path: &str) -> Result<bool, AdapterError> {
        let is_excluded = self.excluded.as_ref().map_or(Ok(false), |excluded| excluded.matches(path))?;
        if is_excluded || !self.targets.matches(path)? {
            return Ok(false);
        }
        match &self.layers {
            Some(layers) if !self.targets.names_exactly(path) => {
                Ok(self.layer_of(path)?.is_some_and(|layer| layers.contains(&layer)))
            }
            _ => Ok(true),
        }
    }

    fn layer_of(&self, path: &str) -> Result<Option<usize>, AdapterError> {
        if self.layer_patterns.is_empty() {
            let number = path.split('.').rev().find(|part| part.starts_with(|c: char| c.is_ascii_digit()));
            return Ok(number.and_then(|number| number.parse().ok()));
        }
        for pattern in &self.layer_patterns {
            if let Some(captures) = pattern.captures(path)? {
                return Ok(captures.get(1).and_then(|number| number.as_str().parse().ok()));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::{Architecture, Features};

    fn spec() -> ModelSpec {
        ModelSpec {
            architecture: Architecture::Llama,
            hidden_size: 8,
            intermediate_size: 16,
            num_layers: 12,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 4,
            vocab_size: 10,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            context_length: 64,
            features: Features::PLAIN,
        }
    }

    fn names(names: &[&str]) -> PathMatch {
        PathMatch::Names(names.iter().map(ToString::to_string).collect())
    }

    fn all_layers(targets: PathMatch) -> SiteSelector {
        SiteSelector { targets, parameters: Vec::new(), excluded: None, layers: None, layer_patterns: Vec::new() }
    }

    #[test]
    fn a_name_matches_whole_path_components_only() {
        let sites = all_layers(names(&["q_proj", "roj", "3.mlp.up_proj"])).targets(&spec()).unwrap().sites;
        assert_eq!(sites.len(), 13);
        assert!(sites.contains(&(3, Module::UpProj)) && !sites.contains(&(4, Module::UpProj)));
    }

    #[test]
    fn a_pattern_must_match_the_whole_path() {
        let pattern =
            |p| all_layers(PathMatch::Pattern(PathPattern::whole("target_modules", p).unwrap())).targets(&spec());
        assert_eq!(pattern(r".*\.(q|v)_proj").unwrap().sites.len(), 24);
        assert_eq!(pattern(r"q|model\.layers\.[01]\.mlp\.up_proj").unwrap().sites.len(), 2);
        assert!(pattern("q_proj").unwrap_err().to_string().contains("site"));
    }

    #[test]
    fn parameters_are_named_by_their_ending_and_experts_all_at_once() {
        let experts = Some(Experts { count: 3, used: 1, normalizes_shares: true });
        let spec = ModelSpec { features: Features { experts, ..Features::PLAIN }, ..spec() };
        let targets = |parameters: &[&str]| {
            let parameters = parameters.iter().map(ToString::to_string).collect();
            SiteSelector { parameters, ..all_layers(names(&[])) }.targets(&spec)
        };
        assert_eq!(targets(&["gate_up_proj"]).unwrap().sites.len(), 12 * 3 * 2);
        assert_eq!(targets(&["mlp.experts.down_proj", "gate.weight"]).unwrap().sites.len(), 12 * (3 + 1));
        let one = targets(&["model.layers.3.mlp.gate.weight", "4.self_attn.q_proj.weight"]).unwrap().sites;
        assert_eq!(one.into_iter().collect::<Vec<_>>(), [(3, Module::Router), (4, Module::QProj)]);
        for unknown in ["gate", "experts.0.down_proj.weight", "q_proj"] {
            let refusal = targets(&["gate.weight", unknown]).unwrap_err().to_string();
            assert!(refusal.contains("target_parameters") && refusal.contains(unknown), "{refusal}");
        }
    }

    #[test]
    fn layers_and_exclusions_narrow_the_targets() {
        let selector = SiteSelector {
            targets: names(&["q_proj", "v_proj"]),
            parameters: Vec::new(),
            excluded: Some(names(&["layers.1.self_attn.v_proj"])),
            layers: Some([1, 11].into()),
            layer_patterns: Vec::new(),
        };
        let sites: Vec<Site> = selector.targets(&spec()).unwrap().sites.into_iter().collect();
        assert_eq!(sites, [(1, Module::QProj), (11, Module::QProj), (11, Module::VProj)]);
    }

    #[test]
    fn a_layers_pattern_that_names_another_list_selects_nothing() {
        let mut selector = all_layers(names(&["q_proj"]));
        selector.layers = Some([1].into());
        selector.layer_patterns = vec![PathPattern::at_start("layers_pattern", r".*\.layers\.(\d+)\.").unwrap()];
        assert_eq!(selector.targets(&spec()).unwrap().sites.len(), 1);
        selector.layer_patterns = vec![PathPattern::at_start("layers_pattern", r".*\.h\.(\d+)\.").unwrap()];
        assert!(selector.targets(&spec()).unwrap_err().to_string().contains("site"));
    }

    #[test]
    fn a_layer_the_base_does_not_have_is_refused() {
        let mut selector = all_layers(names(&["q_proj"]));
        selector.layers = Some([1, 12].into());
        assert!(selector.targets(&spec()).unwrap_err().to_string().contains("layers_to_transform"));
    }

    #[test]
    fn embedding_and_head_are_named_like_any_module_and_belong_to_no_layer() {
        let selector = all_layers(names(&["q_proj", "embed_tokens", "lm_head"]));
        let targets = selector.targets(&spec()).unwrap();
        assert!(targets.embedding && targets.head && targets.sites.len() == 12);
        let targets = SiteSelector { layers: Some([1].into()), ..selector }.targets(&spec()).unwrap();
        // `lm_head` is the whole path, which no choice of layers narrows.
        assert!(!targets.embedding && targets.head && targets.sites.len() == 1);
        let targets =
            all_layers(PathMatch::Pattern(PathPattern::whole("target_modules", r".*\.embed_tokens").unwrap()))
                .targets(&spec());
        assert_eq!(targets.unwrap(), Targets { embedding: true, ..Targets::default() });
    }

    #[test]
    fn the_text_part_of_a_model_that_sees_images_is_the_base() {
        let pattern = r".*language_model.*\.layers\.[01]\..*(q_proj|up_proj)";
        let selected = [
            PathMatch::Pattern(PathPattern::whole("target_modules", pattern).unwrap()),
            names(
                &[0, 1]
                    .map(|layer| {
                        ["self_attn.q_proj", "mlp.up_proj"]
                            .map(|module| format!("model.language_model.layers.{layer}.{module}"))
                    })
                    .concat()
                    .iter()
                    .map(String::as_str)
                    .collect::<Vec<_>>(),
            ),
        ];
        for targets in selected {
            let sites: Vec<Site> = all_layers(targets).targets(&spec()).unwrap().sites.into_iter().collect();
            assert_eq!(sites, [(0, Module::QProj), (0, Module::UpProj), (1, Module::QProj), (1, Module::UpProj)]);
        }
    }

    #[test]
    fn a_file_must_hold_exactly_the_sites_that_are_named() {
        let targets =
            |sites: &[Site], embedding| Targets { sites: sites.iter().copied().collect(), embedding, head: false };
        let expected = targets(&[(0, Module::QProj), (1, Module::QProj)], true);
        expected.check_found(&expected).unwrap();
        let refusal = |found: Targets| expected.check_found(&found).unwrap_err().to_string();
        assert!(refusal(targets(&[(0, Module::QProj)], true)).contains("2 of the 3 sites"));
        assert!(refusal(targets(&[(0, Module::QProj), (1, Module::QProj)], false)).contains("embed_tokens is missing"));
        let more = targets(&[(0, Module::QProj), (1, Module::QProj), (1, Module::UpProj)], true);
        assert!(refusal(more).contains("up_proj, which"));
    }
}
