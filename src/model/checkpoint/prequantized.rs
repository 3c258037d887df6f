//! Checkpoints that another program has quantized: what their configuration says of it, and their matrices.
//!
//! MLX's integers and FP8 are dequantized by mistralrs-quant. GPTQ and AWQ it reads on a card only, and bitsandbytes' four bits are
//! right on a card only, so that they have readers here.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Device, Tensor};
use mistralrs_quant::{QuantizedConfig, ShardedSafeTensors, ShardedVarBuilder};
use serde_json::{Value, json};

use super::CheckpointError;
use super::bitsandbytes;
use super::fields::{Fields, refuse};
use super::integers::{Layout, Packing};
use super::matrix::{BLOCK_LEN, Form, Matrix};
use super::shards::Shards;

const INSTEAD: &str = "give the checkpoint that it was made of, or a GGUF file";

/// Fields that say how the weights were found, how another program multiplies them, or what the tensors say themselves.
const WITHOUT_EFFECT: &[&str] = &[
    "_load_in_4bit",
    "_load_in_8bit",
    "activation_scheme",
    "amp",
    "autoround_version",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "do_fuse",
    // Bits and groups of single modules, which the shapes of their tensors must fit.
    "dynamic",
    "enable_minmax_tuning",
    "enable_norm_bias_tuning",
    "enable_quanted_input",
    "exllama_config",
    "fuse_max_seq_len",
    "gradient_accumulate_steps",
    "ignored_layers",
    "iters",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "lm_head",
    "load_in_4bit",
    "low_gpu_mem_usage",
    "lr",
    "max_input_length",
    "meta",
    "minmax_lr",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "modules_to_fuse",
    "modules_to_not_convert",
    "mse",
    "nsamples",
    "pack_impl",
    "pad_token_id",
    "parallel_packing",
    "provider",
    "quantizer",
    "scale_dtype",
    // How the scales were rounded.
    "scale_fmt",
    "seqlen",
    "static_groups",
    // The zeros say it.
    "sym",
    "to_quant_block_names",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
];

/// How matrices are quantized.
pub enum Method {
    Integers(Layout),
    /// `scale · code + bias` in groups of inputs; "AFQ" to the library.
    Mlx {
        of_most: Affine,
        of_modules: BTreeMap<String, Affine>,
    },
    Fp8 {
        /// Outputs and inputs that have one scale; all of a matrix without.
        block_size: Option<[usize; 2]>,
    },
    Bitsandbytes,
}

#[derive(Clone, Copy)]
pub struct Affine {
    bits: usize,
    group_size: usize,
}

impl Method {
    /// What `config.json` says; MLX says it twice.
    pub fn of(fields: &Fields) -> Result<Option<Self>, CheckpointError> {
        let (name, value) = match (fields.take("quantization_config"), fields.take("quantization")) {
            (None, None) => return Ok(None),
            (Some(one), Some(other)) if one != other => {
                return Err(refuse("quantization", "says otherwise than quantization_config"));
            }
            (Some(value), _) => ("quantization_config", value),
            (None, Some(value)) => ("quantization", value),
        };
        let fields = Fields::of_object(name, value)?;
        fields.must_be("data_type", &[json!("int")])?;
        let method = match fields.text("quant_method")?.as_deref() {
            Some("gptq") => Self::Integers(gptq(&fields)?),
            Some("awq") => Self::Integers(awq(&fields)?),
            Some("afq") | None => mlx(&fields)?,
            Some("fp8") => fp8(&fields)?,
            Some("bitsandbytes") => {
                fields.must_be("load_in_8bit", &[json!(false)])?;
                Self::Bitsandbytes
            }
            Some(other) => {
                let read = "gptq, awq, afq (MLX), fp8 and bitsandbytes";
                return Err(fields.refuse("quant_method", format!("{other:?} is not read ({read} are): {INSTEAD}")));
            }
        };
        fields.refuse_the_rest(WITHOUT_EFFECT)?;
        Ok(Some(method))
    }

    /// The part of a quantized matrix that it is known by; its shape need not be the matrix's.
    fn main_part(&self) -> &'static str {
        match self {
            Self::Integers(_) => "qweight",
            _ => "weight",
        }
    }

    /// The parts beside the main one, within the module.
    fn parts(&self) -> &'static [&'static str] {
        match self {
            Self::Integers(layout) => layout.parts(),
            Self::Mlx { .. } => &["scales", "biases"],
            // Activations are rounded as those of every base are.
            Self::Fp8 { .. } => &["weight_scale_inv", "activation_scale", "input_scale"],
            Self::Bitsandbytes => bitsandbytes::PARTS,
        }
    }
}

fn gptq(fields: &Fields) -> Result<Layout, CheckpointError> {
    let bits = one_of(fields, "bits", &[2, 3, 4, 8])?;
    fields.must_be("pack_dtype", &[json!("int32")])?;
    let has_act_order = fields.flag("desc_act")?.unwrap_or(false);
    let (named, other) = (fields.text("checkpoint_format")?, fields.text("format")?);
    let zeros_are_one_less = match named.or(other).as_deref() {
        None | Some("gptq") => true,
        Some("gptq_v2") => false,
        Some(other) => {
            return Err(
                fields.refuse("checkpoint_format", format!("{other:?} is not read (gptq and gptq_v2 are): {INSTEAD}"))
            );
        }
    };
    let packing = Packing::Gptq { zeros_are_one_less, has_act_order };
    Ok(Layout { bits, group_size: group_size(fields)?, packing })
}

fn awq(fields: &Fields) -> Result<Layout, CheckpointError> {
    let bits = one_of(fields, "bits", &[4])?;
    fields.must_be("zero_point", &[json!(true)])?;
    for field in ["version", "checkpoint_format", "format"] {
        match fields.text(field)? {
            Some(other) if !other.eq_ignore_ascii_case("gemm") => {
                return Err(fields.refuse(field, format!("{other:?} is not read (gemm is): {INSTEAD}")));
            }
            _ => {}
        }
    }
    // llm-awq packs otherwise.
    fields.must_be("backend", &[json!("autoawq")])?;
    Ok(Layout { bits, group_size: group_size(fields)?, packing: Packing::Awq })
}

/// `None` for whole rows.
fn group_size(fields: &Fields) -> Result<Option<usize>, CheckpointError> {
    if fields.take("group_size") == Some(&json!(-1)) { Ok(None) } else { fields.count("group_size").map(Some) }
}

fn mlx(fields: &Fields) -> Result<Method, CheckpointError> {
    let of_most = affine(fields)?;
    let mut of_modules = BTreeMap::new();
    for (module, value) in fields.take_all(|name| name.contains('.') || name == "lm_head") {
        // Whether a module is quantized, its tensors say.
        if !value.is_boolean() {
            let fields = Fields::of_object(module, value)?;
            of_modules.insert(module.to_owned(), affine(&fields)?);
            fields.refuse_the_rest(&[])?;
        }
    }
    Ok(Method::Mlx { of_most, of_modules })
}

fn affine(fields: &Fields) -> Result<Affine, CheckpointError> {
    fields.must_be("mode", &[json!("affine")])?;
    Ok(Affine {
        bits: one_of(fields, "bits", &[2, 3, 4, 6, 8])?,
        group_size: one_of(fields, "group_size", &[32, 64, 128])?,
    })
}

fn fp8(fields: &Fields) -> Result<Method, CheckpointError> {
    fields.must_be("fmt", &[json!("e4m3"), json!("float8_e4m3fn")])?;
    let Some(value) = fields.take("weight_block_size") else { return Ok(Method::Fp8 { block_size: None }) };
    let count = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    let sizes = value.as_array().and_then(|sizes| sizes.iter().map(count).collect::<Option<Vec<_>>>());
    let block_size = sizes.and_then(|sizes| sizes.try_into().ok());
    let wrong = || fields.refuse("weight_block_size", format!("{value} is not two numbers from 1 on"));
    Ok(Method::Fp8 { block_size: Some(block_size.ok_or_else(wrong)?) })
}

fn one_of(fields: &Fields, name: &str, read: &[usize]) -> Result<usize, CheckpointError> {
    let value = fields.count(name)?;
    if read.contains(&value) {
        return Ok(value);
    }
    let read = read.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    Err(fields.refuse(name, format!("{value} is not read ({read}): {INSTEAD}")))
}

/// The quantized matrices of a checkpoint, if it has any.
pub struct Prequantized<'a> {
    method: Option<&'a Method>,
    shards: &'a Shards,
    /// The same tensors, as the library asks for them.
    tensors: ShardedVarBuilder,
}

impl<'a> Prequantized<'a> {
    pub fn new(method: Option<&'a Method>, shards: &'a Shards) -> Self {
        let tensors = ShardedSafeTensors::wrap(Box::new(shards.clone()), DType::F32, Device::Cpu);
        Self { method, shards, tensors }
    }

    pub fn is_quantized(&self) -> bool {
        self.method.is_some()
    }

    /// Whether tensors of this name are the quantized matrices.
    pub fn is_main_part(&self, part: &str) -> bool {
        self.method.is_some_and(|method| method.main_part() == part)
    }

    /// Whether tensors of this name are read with the matrix of their module.
    pub fn is_part(&self, part: &str) -> bool {
        self.method.is_some_and(|method| method.parts().contains(&part))
    }

    /// Whether this is a bias that GPTQ's packing program gave a module which has none.
    pub fn is_empty_bias(&self, module: &str, part: &str) -> Result<bool, CheckpointError> {
        if part != "bias" || !self.shards.contains(&format!("{module}.qweight")) {
            return Ok(false);
        }
        let name = format!("{module}.bias");
        let bias = self.shards.tensor(&name)?.to_dtype(DType::F32).and_then(|bias| bias.to_vec1::<f32>());
        Ok(bias.map_err(|e| CheckpointError::tensor(&name, e))?.iter().all(|value| *value == 0.0))
    }

    /// Refuses a matrix of floats that has what only a quantized one has.
    pub fn refuse_parts_of(&self, module: &str) -> Result<(), CheckpointError> {
        let parts = self.method.iter().flat_map(|method| method.parts()).map(|part| format!("{module}.{part}"));
        match parts.into_iter().find(|part| self.shards.contains(part)) {
            Some(part) => Err(CheckpointError::tensor(&part, "stands beside a matrix that is not quantized")),
            None => Ok(()),
        }
    }

    /// The matrix of a module, of `shape` `(out, in)`.
    pub fn matrix(&self, module: &str, shape: (usize, usize)) -> Result<Matrix, CheckpointError> {
        let in_module = |e: candle_core::Error| CheckpointError::tensor(&format!("{module}.weight"), e);
        let refuse = |reason: String| CheckpointError::tensor(&format!("{module}.weight"), reason);
        let (config, form) = match self.method {
            None => return Err(refuse("is not of floats, and config.json has no quantization_config".to_owned())),
            Some(Method::Integers(layout)) => return layout.read(self.shards, module, shape),
            Some(Method::Bitsandbytes) => return bitsandbytes::read(self.shards, module, shape),
            Some(Method::Mlx { of_most, of_modules }) => {
                let Affine { bits, group_size } = *of_modules.get(module).unwrap_or(of_most);
                if !shape.1.is_multiple_of(group_size) {
                    return Err(refuse(format!("has rows of {}, which are no groups of {group_size}", shape.1)));
                }
                let is_word = |dtype| dtype == DType::U32;
                self.shards.tensor_of(&format!("{module}.weight"), &[shape.0, shape.1 * bits / 32], is_word)?;
                let of_blocks = |part: &str| {
                    let (name, groups) = (format!("{module}.{part}"), [shape.0, shape.1 / group_size]);
                    let groups = self.shards.tensor_of(&name, &groups, |dtype| dtype.is_float())?.to_dtype(DType::F32);
                    groups.and_then(|groups| repeat_columns(&groups, group_size / BLOCK_LEN)).map_err(in_module)
                };
                let form = Form::Blocks { scales: of_blocks("scales")?, offsets: Some(of_blocks("biases")?) };
                (QuantizedConfig::Afq { bits, group_size }, form)
            }
            Some(Method::Fp8 { block_size }) => {
                // The library takes it for the weights themselves without.
                if !self.shards.contains(&format!("{module}.weight_scale_inv")) {
                    return Err(CheckpointError::tensor(&format!("{module}.weight_scale_inv"), "is missing"));
                }
                let weight_block_size = block_size.map(|sizes| sizes.to_vec());
                (QuantizedConfig::Fp8 { weight_block_size }, Form::Dequantized)
            }
        };
        let dequantize = || {
            let layer = mistralrs_quant::linear_no_bias(shape.1, shape.0, &Some(config), self.tensors.pp(module))?;
            layer.dequantize_w()?.to_dtype(DType::F32)
        };
        // It counts on parts that fit each other, and panics where they do not.
        let weights = catch_unwind(AssertUnwindSafe(dequantize))
            .map_err(|_| refuse("and its scales do not fit each other".to_owned()))?
            .map_err(in_module)?;
        if weights.dims() != [shape.0, shape.1] {
            return Err(refuse(format!("is {:?}, and config.json says {shape:?}", weights.dims())));
        }
        Ok(Matrix { weights, form })
    }
}

/// Every column `count` times.
fn repeat_columns(matrix: &Tensor, count: usize) -> candle_core::Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    matrix.unsqueeze(2)?.broadcast_as((rows, columns, count))?.reshape((rows, columns * count))
}
