//! The header of a GGUF file: metadata, and which tensors lie where. Nothing is believed of it before it was compared with the
//! bytes there are.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;

#[derive(Debug)]
pub struct Header {
    pub metadata: HashMap<String, Value>,
    pub tensors: HashMap<String, TensorEntry>,
    /// Where the tensors begin, in bytes of the file.
    pub data_offset: usize,
}

/// A tensor as the header has it.
#[derive(Debug)]
pub struct TensorEntry {
    /// GGML's number of its type.
    pub type_number: u32,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// From where the tensors begin.
    pub offset: u64,
}

/// Versions with 64-bit lengths; the one before has not been written since August 2023.
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
/// Nested deeper than this are no lists of tokens.
const MAX_DEPTH: usize = 4;
const MAX_DIMENSIONS: u32 = 8;
/// Of all arrays together: a value takes more memory than the byte that it may take in the file. The largest vocabularies have
/// a million tokens and merges.
const MAX_ELEMENTS: usize = 1 << 24;

/// # Errors
/// When the bytes are no whole header, in words.
pub fn read(bytes: &[u8]) -> Result<Header, String> {
    let mut reader = Reader { rest: bytes, elements_left: MAX_ELEMENTS };
    if reader.take(4)? != b"GGUF" {
        return Err("it does not begin with GGUF".to_owned());
    }
    let version = reader.u32()?;
    if !VERSIONS.contains(&version) {
        let (first, last) = VERSIONS.into_inner();
        return Err(format!("its version is {version}, and {first} to {last} are read (little-endian)"));
    }
    let (num_tensors, num_keys) = (reader.u64()?, reader.u64()?);
    let mut metadata = HashMap::new();
    for _ in 0..num_keys {
        let key = reader.string()?;
        let value = reader.value(MAX_DEPTH).map_err(|reason| format!("key {key}: {reason}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("it has the key {key} twice"));
        }
    }
    let mut tensors = HashMap::new();
    for _ in 0..num_tensors {
        let name = reader.string()?;
        let entry = reader.tensor().map_err(|reason| format!("tensor {name}: {reason}"))?;
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(format!("it has the tensor {name} twice"));
        }
    }
    let alignment = metadata.get(ALIGNMENT).map_or(Some(DEFAULT_ALIGNMENT), super::whole_number);
    let alignment = alignment.filter(|alignment| *alignment > 0).ok_or_else(|| format!("{ALIGNMENT} is no size"))?;
    let data_offset = (bytes.len() - reader.rest.len()).next_multiple_of(alignment);
    Ok(Header { metadata, tensors, data_offset })
}

struct Reader<'a> {
    rest: &'a [u8],
    /// How many elements the arrays to come may have.
    elements_left: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or("it ends within its header: it is truncated")?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.take(N)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn len(&mut self) -> Result<usize, String> {
        // What is longer than the address space ends behind the file's end too.
        Ok(usize::try_from(self.u64()?).unwrap_or(usize::MAX))
    }

    /// Text that is not UTF-8 gets replacement characters: vocabularies have some.
    fn string(&mut self) -> Result<String, String> {
        let len = self.len()?;
        let bytes = self.take(len)?;
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    fn value(&mut self, max_depth: usize) -> Result<Value, String> {
        let kind = self.u32()?;
        self.value_of(kind, max_depth)
    }

    fn value_of(&mut self, kind: u32, max_depth: usize) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::U8(self.array::<1>()?[0]),
            1 => Value::I8(self.array().map(i8::from_le_bytes)?),
            2 => Value::U16(self.array().map(u16::from_le_bytes)?),
            3 => Value::I16(self.array().map(i16::from_le_bytes)?),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(self.array().map(i32::from_le_bytes)?),
            6 => Value::F32(self.array().map(f32::from_le_bytes)?),
            7 => match self.array::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("{other} is neither true nor false")),
            },
            8 => Value::String(self.string()?),
            9 => {
                let (kind, len) = (self.u32()?, self.len()?);
                // Every element takes a byte at least.
                if len > self.rest.len() || max_depth == 0 {
                    return Err(format!("an array of {len} does not fit into the file"));
                }
                let left = self.elements_left.checked_sub(len);
                self.elements_left =
                    left.ok_or_else(|| format!("an array of {len}: all together may have {MAX_ELEMENTS} elements"))?;
                let mut values = Vec::with_capacity(len);
                for _ in 0..len {
                    values.push(self.value_of(kind, max_depth - 1)?);
                }
                Value::Array(values)
            }
            10 => Value::U64(self.u64()?),
            11 => Value::I64(self.array().map(i64::from_le_bytes)?),
            12 => Value::F64(self.array().map(f64::from_le_bytes)?),
            other => return Err(format!("{other} is no type of a value")),
        })
    }

    fn tensor(&mut self) -> Result<TensorEntry, String> {
        let num_dimensions = self.u32()?;
        if num_dimensions > MAX_DIMENSIONS {
            return Err(format!("{num_dimensions} dimensions"));
        }
        let mut shape = Vec::with_capacity(num_dimensions as usize);
        for _ in 0..num_dimensions {
            shape.push(self.len()?);
        }
        shape.reverse();
        Ok(TensorEntry { shape, type_number: self.u32()?, offset: self.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(num_tensors: u64, num_keys: u64, rest: &[u8]) -> Vec<u8> {
        let counts = [num_tensors, num_keys].map(u64::to_le_bytes).concat();
        [b"GGUF".as_slice(), &3u32.to_le_bytes(), &counts, rest].concat()
    }

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    #[test]
    fn lengths_beyond_the_file_are_refused_before_anything_is_reserved() {
        let array =
            |kind: u32, len: u64| [9u32, kind].map(u32::to_le_bytes).concat().into_iter().chain(len.to_le_bytes());
        let key = |value: Vec<u8>| header(0, 1, &[text("key"), value].concat());
        let nested = std::iter::repeat_with(|| [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat()).take(99);
        for (bytes, words) in [
            (header(u64::MAX, 0, &[]), "truncated"),
            (header(0, u64::MAX, &[]), "truncated"),
            (header(0, 1, &u64::MAX.to_le_bytes()), "truncated"),
            (key(array(4, u64::MAX).collect()), "does not fit"),
            (key([9u32.to_le_bytes().to_vec(), nested.flatten().collect()].concat()), "does not fit"),
            (key(13u32.to_le_bytes().to_vec()), "13 is no type"),
            (key([7u32.to_le_bytes().as_slice(), &[2]].concat()), "neither true nor false"),
        ] {
            let reason = read(&bytes).unwrap_err();
            assert!(reason.contains(words), "{reason}");
        }
    }

    #[test]
    fn arrays_have_no_more_elements_than_any_vocabulary() {
        let array = |len: usize| {
            let head = [9u32, 0].map(u32::to_le_bytes).concat();
            [head, (len as u64).to_le_bytes().to_vec(), vec![0; len]].concat()
        };
        let of_two = |len: usize| header(0, 2, &[text("one"), array(1 << 16), text("two"), array(len)].concat());
        assert_eq!(read(&of_two(1 << 16)).unwrap().metadata.len(), 2);
        let reason = read(&of_two(MAX_ELEMENTS)).unwrap_err();
        assert!(reason.contains("key two") && reason.contains("an array of 16777216:"), "{reason}");
    }

    #[test]
    fn what_is_there_twice_is_refused() {
        let flag = [7u32.to_le_bytes().as_slice(), &[1]].concat();
        let keys = [text("same"), flag.clone(), text("same"), flag].concat();
        assert!(read(&header(0, 2, &keys)).unwrap_err().contains("same twice"));
    }
}
