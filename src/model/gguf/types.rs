//! GGML's types of tensors by their numbers.

use kernels::quantized::{BlockFormat, WeightType};

/// Every type that ggml has or had; `None` is what this server reads nothing of.
const TYPES: [(u32, &str, Option<WeightType>); 42] = [
    (0, "F32", Some(WeightType::F32)),
    (1, "F16", Some(WeightType::F16)),
    (2, "Q4_0", Some(WeightType::Blocks(BlockFormat::Q4_0))),
    (3, "Q4_1", Some(WeightType::Blocks(BlockFormat::Q4_1))),
    (4, "Q4_2", None),
    (5, "Q4_3", None),
    (6, "Q5_0", Some(WeightType::Blocks(BlockFormat::Q5_0))),
    (7, "Q5_1", Some(WeightType::Blocks(BlockFormat::Q5_1))),
    (8, "Q8_0", Some(WeightType::Blocks(BlockFormat::Q8_0))),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(WeightType::Blocks(BlockFormat::Q2_K))),
    (11, "Q3_K", Some(WeightType::Blocks(BlockFormat::Q3_K))),
    (12, "Q4_K", Some(WeightType::Blocks(BlockFormat::Q4_K))),
    (13, "Q5_K", Some(WeightType::Blocks(BlockFormat::Q5_K))),
    (14, "Q6_K", Some(WeightType::Blocks(BlockFormat::Q6_K))),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", Some(WeightType::Blocks(BlockFormat::IQ4_NL))),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", Some(WeightType::Blocks(BlockFormat::IQ4_XS))),
    (24, "I8", None),
    (25, "I16", None),
    (26, "I32", None),
    (27, "I64", None),
    (28, "F64", None),
    (29, "IQ1_M", None),
    (30, "BF16", Some(WeightType::BF16)),
    (31, "Q4_0_4_4", None),
    (32, "Q4_0_4_8", None),
    (33, "Q4_0_8_8", None),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (36, "IQ4_NL_4_4", None),
    (37, "IQ4_NL_4_8", None),
    (38, "IQ4_NL_8_8", None),
    (39, "MXFP4", Some(WeightType::Blocks(BlockFormat::MXFP4))),
    (40, "NVFP4", None),
    (41, "Q1_0", None),
];

/// The type with this number.
///
/// # Errors
/// What it is, and what is read, when this server can neither multiply nor read it.
pub fn weight_type(number: u32) -> Result<WeightType, String> {
    let found = TYPES.iter().find(|(known, ..)| *known == number);
    let name = match found {
        Some((_, _, Some(weight_type))) => return Ok(*weight_type),
        Some((_, name, None)) => (*name).to_owned(),
        None => format!("{number}, which is unknown"),
    };
    let read: Vec<&str> =
        TYPES.iter().filter(|(.., weight_type)| weight_type.is_some()).map(|(_, name, _)| *name).collect();
    Err(format!("has the type {name}; read are {}", read.join(", ")))
}
