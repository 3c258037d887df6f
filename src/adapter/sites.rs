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

/// What `target_parameters` can name: every linear layer's weight, and the fused weights of experts; their [`paths_in_training`],
/// and the sites that each is of.
fn parameters(spec: &ModelSpec) -> impl Iterator<Item = ([String; 3], Vec<Site>)> {
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
    (0..spec.num_layers).flat_map(of_layer).map(|(path, sites)| (paths_in_training(&path), sites))
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
        match self {
            Self::Pattern(pattern) => pattern.matches_any(&paths_in_training(path)),
            Self::Names(names) => {
                let paths = paths_in_training(path);
                Ok(names.iter().any(|name| is_named(&paths, name)))
            }
        }
    }

    /// A module listed by its full path is adapted whatever `layers_to_transform` says.
    fn names_exactly(&self, path: &str) -> bool {
        match self {
            Self::Pattern(_) => true,
            Self::Names(names) => paths_in_training(path).iter().any(|path| names.contains(path)),
        }
    }
}

/// What a module of the base may have been called in training: by its own path, or by that within a model that sees images too,
/// whose part for text is the base. The second is that of Transformers since 4.52, the third that of those before.
pub fn paths_in_training(path: &str) -> [String; 3] {
    let within = path.replacen("model.", &format!("model.{TEXT_MODEL}."), 1);
    [path.to_string(), within, format!("{TEXT_MODEL}.{path}")]
}

/// Whether one of the [`paths_in_training`] of a module or parameter is this name, or ends in it behind a dot.
fn is_named(paths: &[String], name: &str) -> bool {
    let is_ending = |path: &String| path.strip_suffix(name).is_some_and(|stem| stem.is_empty() || stem.ends_with('.'));
    paths.iter().any(is_ending)
}

/// `target_modules`, `target_parameters`, `exclude_modules`, `layers_to_transform` and `layers_pattern` of a configuration.
#[derive(Debug)]
pub struct SiteSelector {
    pub targets: PathMatch,
    /// Names of parameters, which nothing narrows.
    pub parameters: Vec<String>,
    pub excluded: Option<PathMatch>,
    /// `None` is every layer.
    pub layers: Option<ChosenLayers>,
}

/// `layers_to_transform`, and where `layers_pattern` finds the number of a layer in a path.
#[derive(Debug)]
pub struct ChosenLayers {
    pub numbers: BTreeSet<usize>,
    patterns: Vec<PathPattern>,
}

impl ChosenLayers {
    /// `lists` are what the layer list may be called in a path, patterns; none accepts any name. Of several numbers in a path the
    /// first is the layer's, as in PEFT since 0.19: a later one is an expert's.
    ///
    /// # Errors
    /// When one of the lists is no pattern.
    pub fn new(numbers: BTreeSet<usize>, lists: &[&str]) -> Result<Self, AdapterError> {
        let behind = |list: String| PathPattern::at_start("layers_pattern", &format!(r"{list}\.(?P<idx>\d+)\."));
        let patterns = if lists.is_empty() {
            vec![behind(r".*?\.[^.]*".to_string())?]
        } else {
            lists.iter().map(|list| behind(format!(r"(?:^|.*?\.){list}"))).collect::<Result<_, _>>()?
        };
        Ok(Self { numbers, patterns })
    }

    fn contain(&self, path: &str) -> Result<bool, AdapterError> {
        let paths = paths_in_training(path);
        for pattern in &self.patterns {
            for path in &paths {
                if let Some(captures) = pattern.captures(path)? {
                    let number = captures.name("idx").and_then(|number| number.as_str().parse().ok());
                    return Ok(number.is_some_and(|number| self.numbers.contains(&number)));
                }
            }
        }
        Ok(false)
    }
}

impl SiteSelector {
    /// What of the base the configuration names.
    ///
    /// # Errors
    /// When it names nothing, or a layer that the base does not have.
    pub fn targets(&self, spec: &ModelSpec) -> Result<Targets, AdapterError> {
        let chosen = self.layers.iter().flat_map(|chosen| &chosen.numbers);
        if let Some(layer) = chosen.copied().find(|layer| *layer >= spec.num_layers) {
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
        let parameters: Vec<([String; 3], Vec<Site>)> =
            if self.parameters.is_empty() { Vec::new() } else { parameters(spec).collect() };
        for name in &self.parameters {
            let mut named = parameters.iter().filter(|(paths, _)| is_named(paths, name)).peekable();
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
        if self.parameters.is_empty() {
            return path;
        }
        let weight = format!("{path}.weight");
        let paths = paths_in_training(&weight);
        if self.parameters.iter().any(|name| is_named(&paths, name)) { weight } else { path }
    }

    fn selects(&self, path: &str) -> Result<bool, AdapterError> {
        let is_excluded = self.excluded.as_ref().map_or(Ok(false), |excluded| excluded.matches(path))?;
        if is_excluded || !self.targets.matches(path)? {
            return Ok(false);
        }
        match &self.layers {
            Some(chosen) if !self.targets.names_exactly(path) => chosen.contain(path),
            _ => Ok(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::{Architecture, Features, Projection};

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
        SiteSelector { targets, parameters: Vec::new(), excluded: None, layers: None }
    }

    fn layers(numbers: &[usize], lists: &[&str]) -> Option<ChosenLayers> {
        Some(ChosenLayers::new(numbers.iter().copied().collect(), lists).unwrap())
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
        for layers in ["model.layers", "model.language_model.layers", "language_model.model.layers"] {
            let gate = format!("{layers}.3.mlp.gate.weight");
            let one = targets(&[&gate, "4.self_attn.q_proj.weight"]).unwrap().sites;
            assert_eq!(one.into_iter().collect::<Vec<_>>(), [(3, Module::Router), (4, Module::QProj)]);
        }
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
            layers: layers(&[1, 11], &[]),
        };
        let sites: Vec<Site> = selector.targets(&spec()).unwrap().sites.into_iter().collect();
        assert_eq!(sites, [(1, Module::QProj), (11, Module::QProj), (11, Module::VProj)]);
    }

    #[test]
    fn a_layers_pattern_that_names_another_list_selects_nothing() {
        let sites = |lists: &[&str]| {
            SiteSelector { layers: layers(&[1], lists), ..all_layers(names(&["q_proj"])) }
                .targets(&spec())
                .map(|targets| targets.sites.into_iter().collect::<Vec<_>>())
        };
        for lists in
            [&["layers"][..], &["h", "layers"], &["model.layers"], &["lay(er|ing)s"], &["language_model.layers"]]
        {
            assert_eq!(sites(lists).unwrap(), [(1, Module::QProj)], "{lists:?}");
        }
        for lists in [&["h"][..], &["ayers"], &["mlp"]] {
            assert!(sites(lists).unwrap_err().to_string().contains("site"), "{lists:?}");
        }
    }

    #[test]
    fn the_first_number_of_a_path_is_the_layer_and_a_later_one_an_experts() {
        let experts = Some(Experts { count: 3, used: 1, normalizes_shares: true });
        let spec = ModelSpec { features: Features { experts, ..Features::PLAIN }, ..spec() };
        for lists in [&[][..], &["layers"]] {
            let selector = SiteSelector { layers: layers(&[2], lists), ..all_layers(names(&["up_proj"])) };
            let sites: Vec<Site> = selector.targets(&spec).unwrap().sites.into_iter().collect();
            let of_expert = |expert| (2, Module::Expert(expert, Projection::Up));
            assert_eq!(sites, [0, 1, 2].map(of_expert), "{lists:?}");
        }
    }

    #[test]
    fn a_layer_the_base_does_not_have_is_refused() {
        let selector = SiteSelector { layers: layers(&[1, 12], &[]), ..all_layers(names(&["q_proj"])) };
        assert!(selector.targets(&spec()).unwrap_err().to_string().contains("layers_to_transform"));
    }

    #[test]
    fn embedding_and_head_are_named_like_any_module_and_belong_to_no_layer() {
        let selector = all_layers(names(&["q_proj", "embed_tokens", "lm_head"]));
        let targets = selector.targets(&spec()).unwrap();
        assert!(targets.embedding && targets.head && targets.sites.len() == 12);
        let targets = SiteSelector { layers: layers(&[1], &[]), ..selector }.targets(&spec()).unwrap();
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
    fn a_module_named_as_it_was_called_beside_images_is_adapted_whatever_the_layers() {
        let q = "layers.4.self_attn.q_proj";
        for name in [format!("model.{q}"), format!("model.language_model.{q}"), format!("language_model.model.{q}")] {
            let selector = SiteSelector { layers: layers(&[1], &[]), ..all_layers(names(&[&name, "v_proj"])) };
            let sites: Vec<Site> = selector.targets(&spec()).unwrap().sites.into_iter().collect();
            assert_eq!(sites, [(1, Module::VProj), (4, Module::QProj)], "{name}");
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
