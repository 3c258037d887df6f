//! A GGUF file's metadata as a description of its decoder. Every key of the decoder is applied, or the file is refused with
//! the key's name and value.

use std::cell::RefCell;
use std::collections::BTreeSet;

use candle_core::quantized::gguf_file::Value;
use kernels::activations::BLOCK;
use kernels::attention::MAX_HEAD_DIM;
use kernels::shape::Experts;

use super::base_weights::{EMBEDDING_TENSOR, HEAD_TENSOR};
use super::family::{EmbeddingScale, Family};
use super::gguf::{GgufError, GgufFile, whole_number};
use super::rope::{LongRope, RopeScaling, Yarn};
use super::spec::{Features, ModelSpec, Module, Window};

/// Factors of Llama 3's rotary frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// LongRoPE's, of contexts within the original one and beyond it.
const SHORT_ROPE_FACTORS: &str = "rope_factors_short.weight";
const LONG_ROPE_FACTORS: &str = "rope_factors_long.weight";
const TOKENS: &str = "tokenizer.ggml.tokens";

/// Keys of the decoder that change nothing of what it computes.
const WITHOUT_EFFECT: [&str; 3] =
    ["rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout"];

/// The largest number that a key may give, be it of positions: more than any decoder has. What sizes are multiplied to stays
/// within a machine's word, and what is laid out for as many positions within its memory.
pub const MAX_COUNT: usize = 1 << 23;
/// Experts of a block: as many as llama.cpp allows.
const MAX_EXPERTS: usize = 512;

/// Keys below the name of the architecture. Which were read is kept.
struct Keys<'a> {
    file: &'a GgufFile,
    prefix: &'static str,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    fn get(&self, name: &str) -> Option<(String, &'a Value)> {
        let key = format!("{}.{name}", self.prefix);
        let value = self.file.metadata(&key);
        self.read.borrow_mut().insert(key.clone());
        value.map(|value| (key, value))
    }

    /// A whole number, or as many equal ones as there are layers.
    fn count(&self, name: &str) -> Result<Option<usize>, GgufError> {
        let Some((key, value)) = self.get(name) else { return Ok(None) };
        let count = |value: &Value| match whole_number(value) {
            None => Err(GgufError::WrongType { key: key.clone(), expected: "a whole number" }),
            Some(number) if number > MAX_COUNT => {
                Err(GgufError::of_key(&key, value, &format!("at most {MAX_COUNT} is supported")))
            }
            Some(number) => Ok(number),
        };
        let Value::Array(values) = value else { return count(value).map(Some) };
        let numbers: Vec<usize> = values.iter().map(count).collect::<Result<_, _>>()?;
        match &numbers[..] {
            [first, rest @ ..] if rest.iter().all(|number| number == first) => Ok(Some(*first)),
            _ => Err(GgufError::of_key(&key, value, "layers that differ in size are not supported")),
        }
    }

    fn number(&self, name: &str) -> Result<Option<f32>, GgufError> {
        let Some((key, value)) = self.get(name) else { return Ok(None) };
        let number = value.to_f32().or_else(|_| value.to_f64().map(|number| number as f32));
        match number {
            Err(_) => Err(GgufError::WrongType { key, expected: "a floating-point number" }),
            Ok(number) if !number.is_finite() => Err(GgufError::of_key(&key, value, "expected a number")),
            Ok(number) => Ok(Some(number)),
        }
    }

    /// A number that is not there if it is 0.
    fn positive(&self, name: &str) -> Result<Option<f32>, GgufError> {
        let Some(number) = self.number(name)? else { return Ok(None) };
        if number < 0.0 {
            let value = Value::F32(number);
            return Err(GgufError::of_key(&format!("{}.{name}", self.prefix), &value, "expected a positive number"));
        }
        Ok(Some(number).filter(|number| *number > 0.0))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, GgufError> {
        match self.get(name) {
            None => Ok(None),
            Some((_, Value::Bool(flag))) => Ok(Some(*flag)),
            Some((key, _)) => Err(GgufError::WrongType { key, expected: "true or false" }),
        }
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>, GgufError> {
        let Some((key, value)) = self.get(name) else { return Ok(None) };
        let wrong = |_| GgufError::WrongType { key, expected: "a string" };
        value.to_string().map(|text| Some(text.as_str())).map_err(wrong)
    }

    fn required<T>(&self, name: &str, value: Result<Option<T>, GgufError>) -> Result<T, GgufError> {
        value?.ok_or_else(|| GgufError::MissingKey(format!("{}.{name}", self.prefix)))
    }

    /// At least 1.
    fn required_count(&self, name: &str) -> Result<usize, GgufError> {
        match self.required(name, self.count(name))? {
            0 => Err(GgufError::of_key(
                &format!("{}.{name}", self.prefix),
                &Value::U32(0),
                "expected a number from 1 on",
            )),
            count => Ok(count),
        }
    }

    /// Refuses a key unless it has this value.
    fn must_be(&self, name: &str, expected: usize) -> Result<(), GgufError> {
        match (self.count(name)?, self.get(name)) {
            (Some(count), Some((key, value))) if count != expected => {
                Err(GgufError::of_key(&key, value, &format!("only {expected} is supported")))
            }
            _ => Ok(()),
        }
    }

    /// What was not read has to be without effect, or off.
    fn refuse_the_rest(&self) -> Result<(), GgufError> {
        let read = self.read.borrow();
        let mut rest: Vec<(&str, &Value)> = self.file.metadata_pairs().collect();
        rest.sort_by_key(|(key, _)| *key);
        for (key, value) in rest {
            let below = key.strip_prefix(self.prefix).and_then(|rest| rest.strip_prefix('.'));
            let Some(name) = below else { continue };
            if !read.contains(key) && !WITHOUT_EFFECT.contains(&name) && !is_off(value) {
                return Err(GgufError::of_key(key, value, "this server does not know what it asks for"));
            }
        }
        Ok(())
    }
}

/// Whether a value means what a missing key does.
pub fn is_off(value: &Value) -> bool {
    match value {
        Value::Bool(flag) => !flag,
        Value::F32(number) => *number == 0.0,
        Value::F64(number) => *number == 0.0,
        Value::String(text) => text.is_empty() || text == "none",
        Value::Array(values) => values.iter().all(is_off),
        other => whole_number(other) == Some(0),
    }
}

/// The decoder that a file describes.
///
/// # Errors
/// When the description is not whole, or asks for what this server does not do; names the key.
pub fn spec(file: &GgufFile) -> Result<ModelSpec, GgufError> {
    let name = file.str("general.architecture")?;
    let family = Family::named(name).ok_or_else(|| GgufError::Architecture(name.to_owned(), Family::names()))?;
    let keys = Keys { file, prefix: family.name, read: RefCell::default() };
    let num_layers = keys.required_count("block_count")?;
    // Before anything is laid out for each of them.
    let of_last = format!("blk.{}.attn_norm.weight", num_layers - 1);
    if !file.has_tensor(&of_last) {
        let (key, value) = (format!("{}.block_count", family.name), Value::U64(num_layers as u64));
        return Err(GgufError::of_key(&key, &value, &format!("the file has no tensor {of_last}")));
    }
    let hidden_size = keys.required_count("embedding_length")?;
    let num_heads = keys.required_count("attention.head_count")?;
    let num_kv_heads = keys.count("attention.head_count_kv")?.unwrap_or(num_heads);
    if num_heads == 0 || num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
        return Err(GgufError::Unsupported(format!("{num_heads} heads over {num_kv_heads} key-value heads")));
    }
    let head_dim = keys.count("attention.key_length")?.unwrap_or(hidden_size / num_heads);
    keys.must_be("attention.value_length", head_dim)?;
    if head_dim == 0 || !head_dim.is_multiple_of(16) || head_dim > MAX_HEAD_DIM {
        return Err(GgufError::Unsupported(format!(
            "heads of {head_dim} dimensions (supported: multiples of 16 up to {MAX_HEAD_DIM})"
        )));
    }
    let embedding = file.tensor(EMBEDDING_TENSOR)?;
    let [vocab_size, _] = embedding.shape[..] else {
        let shape = &embedding.shape;
        let reason = format!("tensor {EMBEDDING_TENSOR} has shape {shape:?}, expected [vocabulary, {hidden_size}]");
        return Err(GgufError::Unsupported(reason));
    };
    let num_tokens = file.metadata(TOKENS).and_then(|tokens| tokens.to_vec().ok()).map_or(0, Vec::len);
    // A vocabulary that is named longer than the embedding has tokens without one.
    for (key, count) in [("vocab_size", keys.count("vocab_size")?.unwrap_or(0)), (TOKENS, num_tokens)] {
        if count > vocab_size {
            return Err(GgufError::Unsupported(format!(
                "{key} says {count} tokens, and {EMBEDDING_TENSOR} has {vocab_size} rows"
            )));
        }
    }
    let (intermediate_size, experts) = read_feed_forward(&keys, family)?;
    let length = if experts.is_some() { "expert_feed_forward_length" } else { "feed_forward_length" };
    for (width, name) in [(hidden_size, "embedding_length"), (intermediate_size, length)] {
        if width == 0 || !width.is_multiple_of(BLOCK) {
            return Err(GgufError::Unsupported(format!("{name} {width} is not a multiple of {BLOCK}")));
        }
    }
    let eps = if family.features.centers_norms { "layer_norm_epsilon" } else { "layer_norm_rms_epsilon" };
    let eps = format!("attention.{eps}");
    let mut spec = ModelSpec {
        architecture: family.architecture,
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size,
        rope_theta: keys.positive("rope.freq_base")?.unwrap_or(10_000.0),
        norm_eps: keys.required(&eps, keys.number(&eps))?,
        context_length: keys.required_count("context_length")?,
        features: family.features.clone(),
    };
    spec.features.experts = experts;
    spec.features.fuses_qkv = file.has_tensor("blk.0.attn_qkv.weight");
    spec.features.fuses_gate_up =
        spec.features.activation.is_gated() && experts.is_none() && !file.has_tensor("blk.0.ffn_gate.weight");
    // Off is not what a missing key means.
    if keys.flag("attention.causal")? == Some(false) {
        let key = format!("{}.attention.causal", keys.prefix);
        return Err(GgufError::of_key(
            &key,
            &Value::Bool(false),
            "this server serves models that see what came before alone",
        ));
    }
    read_multipliers(&keys, family, &mut spec)?;
    read_window(&keys, family, &mut spec)?;
    read_rope(&keys, family, &mut spec)?;
    keys.refuse_the_rest()?;
    refuse_other_tensors(file, &spec)?;
    Ok(spec)
}

/// The length of a feed-forward, or of each of its experts, and how those are used.
fn read_feed_forward(keys: &Keys<'_>, family: &Family) -> Result<(usize, Option<Experts>), GgufError> {
    const COUNT: &str = "expert_count";
    const USED: &str = "expert_used_count";
    const NORMALIZES: &str = "expert_weights_norm";
    let length = keys.required("feed_forward_length", keys.count("feed_forward_length"))?;
    if !family.has_experts {
        return Ok((length, None));
    }
    let (count, used) = (keys.required_count(COUNT)?, keys.required_count(USED)?);
    if count > MAX_EXPERTS {
        let key = format!("{}.{COUNT}", keys.prefix);
        return Err(GgufError::of_key(
            &key,
            &Value::U64(count as u64),
            &format!("at most {MAX_EXPERTS} are supported"),
        ));
    }
    if !(1..=count).contains(&used) {
        let key = format!("{}.{USED}", keys.prefix);
        return Err(GgufError::of_key(&key, &Value::U64(used as u64), &format!("there are {count} experts")));
    }
    // The architecture does, and its files need not say so.
    let normalizes_shares = keys.flag(NORMALIZES)?.unwrap_or(true);
    // 1 is the softmax.
    keys.must_be("expert_gating_func", 1)?;
    // Without a length of their own, experts share that of the whole.
    let length = keys.count("expert_feed_forward_length")?.unwrap_or(length / used);
    Ok((length, Some(Experts { count, used, normalizes_shares })))
}

fn read_multipliers(keys: &Keys<'_>, family: &Family, spec: &mut ModelSpec) -> Result<(), GgufError> {
    let features = &mut spec.features;
    if family.embedding_scale == EmbeddingScale::RootOfHiddenSize {
        features.embedding_scale = (spec.hidden_size as f32).sqrt();
    }
    if family.has_multipliers {
        let embedding_scale = keys.positive("embedding_scale")?.unwrap_or(1.0);
        (features.embedding_scale, features.prompt_scale) = (embedding_scale, embedding_scale);
        features.residual_scale = keys.positive("residual_scale")?.unwrap_or(1.0);
        features.logit_scale = 1.0 / keys.positive("logit_scale")?.unwrap_or(1.0);
    }
    if let Some(soft_caps) = family.soft_caps {
        let cap = |name: &str, usual| if keys.get(name).is_some() { keys.positive(name) } else { Ok(usual) };
        features.attention_soft_cap = cap("attn_logit_softcapping", soft_caps.attention)?;
        features.logit_soft_cap = cap("final_logit_softcapping", soft_caps.logits)?;
    }
    if family.layers_scaled_by_hidden_size == Some(spec.num_layers) {
        features.attention_scale = Some(((spec.hidden_size / spec.num_heads) as f32).powf(-0.5));
    }
    features.attention_scale = keys.positive("attention.scale")?.or(features.attention_scale);
    Ok(())
}

fn read_window(keys: &Keys<'_>, family: &Family, spec: &mut ModelSpec) -> Result<(), GgufError> {
    const KEY: &str = "attention.sliding_window";
    const PATTERN: &str = "attention.sliding_window_pattern";
    let usual = family.windows.and_then(|windows| windows.size);
    let Some(size) = keys.count(KEY)?.or(usual).filter(|size| *size > 0) else { return Ok(()) };
    let Some(windows) = family.windows else {
        return match keys.get(KEY) {
            // One that holds the whole context changes nothing.
            Some((key, value)) if size < spec.context_length => {
                Err(GgufError::of_key(&key, value, "models of this architecture have no sliding window"))
            }
            _ => Ok(()),
        };
    };
    let with_full_every = |every: Option<usize>| -> Vec<bool> {
        (1..=spec.num_layers).map(|number| every.is_none_or(|every| !number.is_multiple_of(every))).collect()
    };
    let layers = match keys.get(PATTERN) {
        None => with_full_every(windows.full_every),
        Some((_, Value::Array(flags))) if flags.iter().all(|flag| flag.to_bool().is_ok()) => {
            flags.iter().map(|flag| flag.to_bool().unwrap_or(false)).collect()
        }
        Some((key, value)) => match whole_number(value) {
            Some(every) if every > 0 => with_full_every(Some(every)),
            _ => return Err(GgufError::of_key(&key, value, "expected a number of layers, or a flag for each")),
        },
    };
    if layers.len() != spec.num_layers {
        let key = format!("{}.{PATTERN}", keys.prefix);
        return Err(GgufError::of_key(&key, &Value::U64(layers.len() as u64), "expected a flag for each layer"));
    }
    let rope_theta = keys.positive("rope.freq_base_swa")?.or(windows.rope_theta);
    spec.features.window = Some(Window { size, layers, rope_theta });
    Ok(())
}

fn read_rope(keys: &Keys<'_>, family: &Family, spec: &mut ModelSpec) -> Result<(), GgufError> {
    const TYPE: &str = "rope.scaling.type";
    const FACTOR: &str = "rope.scaling.factor";
    const ORIGINAL: &str = "rope.scaling.original_context_length";
    let head_dim = spec.head_dim;
    let dims = keys.count("rope.dimension_count")?.unwrap_or(head_dim);
    let is_partial = dims != head_dim;
    if dims == 0 || !dims.is_multiple_of(2) || dims > head_dim || (is_partial && spec.features.has_interleaved_heads) {
        return Err(GgufError::Unsupported(format!("{dims} rotary dimensions with heads of {head_dim}")));
    }
    spec.features.rotary_dims = is_partial.then_some(dims);

    let mut scaling = RopeScaling::NONE;
    // Older files name the factor alone, or in older words.
    let factor = keys.positive(FACTOR)?;
    let factor = factor.or(keys.positive("rope.scale_linear")?).unwrap_or(1.0);
    let factors = |name: &str| keys.file.vector(name, dims / 2);
    let has_long_factors = keys.file.has_tensor(LONG_ROPE_FACTORS);
    if keys.file.has_tensor(ROPE_FACTORS) {
        scaling.divisors = factors(ROPE_FACTORS)?;
    }
    match keys.text(TYPE)? {
        Some("none") if !has_long_factors => {}
        None | Some("linear") if !has_long_factors => scaling.factor = factor,
        Some("yarn") => {
            scaling.factor = factor;
            scaling.yarn = Some(Yarn {
                original_context_length: keys.required_count(ORIGINAL)?,
                beta_fast: keys.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            });
            scaling.magnitude = keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
        }
        None | Some("longrope" | "none") if has_long_factors => {
            if factor != 1.0 {
                let key = format!("{}.{FACTOR}", family.name);
                return Err(GgufError::of_key(
                    &key,
                    &Value::F32(factor),
                    "longrope has a factor for each frequency, and none beside",
                ));
            }
            scaling.long_rope = Some(LongRope {
                original_context_length: keys.required_count(ORIGINAL)?,
                short: factors(SHORT_ROPE_FACTORS)?,
                long: factors(LONG_ROPE_FACTORS)?,
            });
            let name = "rope.scaling.attn_factor";
            scaling.magnitude = keys.required(name, keys.positive(name))?;
        }
        Some("longrope") => return Err(GgufError::MissingTensor(LONG_ROPE_FACTORS.to_owned())),
        Some(other) => {
            let value = Value::String(other.to_owned());
            let reason = "supported are none, linear, yarn and longrope";
            return Err(GgufError::of_key(&format!("{}.{TYPE}", family.name), &value, reason));
        }
        None => {}
    }
    let divisors =
        scaling.divisors.iter().chain(scaling.long_rope.iter().flat_map(|rope| rope.short.iter().chain(&rope.long)));
    if let Some(divisor) = divisors.into_iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0)) {
        return Err(GgufError::Unsupported(format!("a rotary factor is {divisor}")));
    }
    if family.has_multipliers && keys.flag("rope.scaling.finetuned")? == Some(false) {
        spec.features.unturned_every = Some(1);
    }
    spec.features.rope_scaling = scaling;
    Ok(())
}

/// A tensor that no part of the decoder reads would change what it computes if one did.
fn refuse_other_tensors(file: &GgufFile, spec: &ModelSpec) -> Result<(), GgufError> {
    let Features { centers_norms, norms_heads, norms_residuals, .. } = spec.features;
    let with_bias = |names: &[&str]| -> Vec<String> {
        let parts = names.iter().flat_map(|name| [(true, "weight"), (centers_norms, "bias")].map(|part| (*name, part)));
        parts.filter(|(_, (is_there, _))| *is_there).map(|(name, (_, part))| format!("{name}.{part}")).collect()
    };
    let mut of_layer = BTreeSet::from_iter(with_bias(&["attn_norm", "ffn_norm"]));
    for module in spec.modules() {
        let part = spec.file_rows(module).part;
        of_layer.insert(format!("{part}.weight"));
        // Routers and experts have none.
        if Module::PLAIN.contains(&module) {
            of_layer.insert(format!("{part}.bias"));
        }
    }
    for (is_there, names) in [
        (norms_heads, ["attn_q_norm.weight", "attn_k_norm.weight"]),
        (norms_residuals, ["post_attention_norm.weight", "post_ffw_norm.weight"]),
    ] {
        of_layer.extend(names.into_iter().filter(|_| is_there).map(str::to_owned));
    }
    let mut of_decoder = with_bias(&["output_norm"]);
    of_decoder.extend([EMBEDDING_TENSOR, HEAD_TENSOR].map(str::to_owned));
    // Those of one kind of scaling say nothing to another.
    let rope_factors: &[&str] = match &spec.features.rope_scaling.long_rope {
        Some(_) => &[SHORT_ROPE_FACTORS, LONG_ROPE_FACTORS],
        None => &[ROPE_FACTORS],
    };
    of_decoder.extend(rope_factors.iter().map(|name| (*name).to_owned()));
    let is_known = |name: &str| match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => {
            let is_layer = layer.parse::<usize>().is_ok_and(|layer| layer < spec.num_layers);
            is_layer && of_layer.contains(part)
        }
        None => of_decoder.iter().any(|known| known == name),
    };
    match file.tensor_names().filter(|name| !is_known(name)).min() {
        Some(name) => Err(GgufError::Unsupported(format!(
            "tensor {name} belongs to no {} decoder of {} layers that this server knows",
            spec.architecture.name(),
            spec.num_layers
        ))),
        None => Ok(()),
    }
}
