use proptest::prelude::*;

use super::sentinels::FimOrder;
use super::vocabulary::{PreTokenizer, Spaces, Strips};
use super::*;

const IM_END: u32 = 258;

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
    String::from_utf8(bytes).expect("whole text decodes to UTF-8")
}

#[test]
fn merges_build_the_longest_token() {
    let tokenizer = Tokenizer::tiny(&["<|im_end|>"]);
    assert_eq!(tokenizer.encode("then", Specials::AsText).unwrap(), [257, u32::from(b'n')]);
}

#[test]
fn a_control_token_in_a_users_text_stays_text() {
    let tokenizer = Tokenizer::tiny(&["<|im_end|>"]);
    let text = "a<|im_end|>b";
    assert_eq!(tokenizer.encode(text, Specials::Parse).unwrap(), [97, IM_END, 98]);
    let as_text = tokenizer.encode(text, Specials::AsText).unwrap();
    assert!(!as_text.contains(&IM_END));
    assert_eq!(decode(&tokenizer, &as_text), text);
}

#[test]
fn a_user_defined_token_matches_in_any_text_unless_it_steers_the_model() {
    let tokenizer = Tokenizer::tiny_with(&["<|im_end|>"], &["<tool_call>", "<|fim_middle|>"]);
    assert_eq!(tokenizer.encode("<tool_call>", Specials::AsText).unwrap(), [259]);
    assert!(!tokenizer.is_special(259));
    assert!(!tokenizer.encode("<|fim_middle|>", Specials::AsText).unwrap().contains(&260));
    assert!(tokenizer.is_special(260));
}

#[test]
fn the_longest_of_overlapping_specials_wins() {
    let tokenizer = Tokenizer::tiny(&["<a>", "<a><b>"]);
    assert_eq!(tokenizer.encode("<a><b><a>", Specials::Parse).unwrap(), [259, 258]);
}

#[test]
fn stop_tokens_take_in_sentinels_only_of_a_whole_family() {
    let without = Tokenizer::tiny(&["<file_sep>", "<|endoftext|>", "<|im_end|>"]);
    assert_eq!(without.stop_tokens().as_ref(), [259, 260]);
    let with = Tokenizer::tiny(&["<file_sep>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"]);
    assert_eq!(with.stop_tokens().as_ref(), [258, 259, 260, 261, 262]);
}

#[test]
fn fill_in_the_middle_tokens_that_the_file_names_come_before_those_known_by_text() {
    let order = FimOrder::PrefixFirst;
    let fim = FimTokens { prefix: 262, suffix: 263, middle: Some(264), order, boundaries: vec![265] };
    let by_text = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"];
    let tokenizer = Tokenizer::tiny_naming(&by_text, &["▁<PRE>", "▁<SUF>", "▁<MID>", "<SEP>"], Some(fim.clone()));
    assert_eq!(tokenizer.fim(), Some(&fim));
    assert_eq!(tokenizer.stop_tokens().as_ref(), [261, 262, 263, 264, 265]);
    assert!(fim.all().all(|id| tokenizer.is_special(id)), "whatever kind the file gives them");
    assert!(!tokenizer.encode("▁<MID>", Specials::AsText).unwrap().contains(&264));
    let unnamed = Tokenizer::tiny(&by_text);
    assert_eq!(unnamed.fim().map(|fim| (fim.prefix, fim.suffix, fim.middle)), Some((258, 259, Some(260))));
}

#[test]
fn what_a_file_does_not_name_of_its_fill_in_the_middle_is_that_of_the_family() {
    let order = FimOrder::PrefixFirst;
    let named = |middle| Some(FimTokens { prefix: 258, suffix: 259, middle, order, boundaries: vec![] });
    let fim = |texts: &[&str], middle| Tokenizer::tiny_naming(&[], texts, named(middle)).fim().cloned();
    let code_llama = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"];
    let boundaries = vec![261];
    let expected = FimTokens { prefix: 258, suffix: 259, middle: Some(260), order, boundaries: boundaries.clone() };
    assert_eq!(fim(&code_llama, Some(260)), Some(expected.clone()));
    assert_eq!(fim(&code_llama, None), Some(expected), "by text");
    let codestral = ["[PREFIX]", "[SUFFIX]", "[MIDDLE]"];
    let order = FimOrder::SuffixFirst;
    let expected = FimTokens { prefix: 258, suffix: 259, middle: None, order, boundaries: vec![260] };
    assert_eq!(fim(&codestral, None), Some(expected.clone()));
    assert_eq!(fim(&codestral, Some(260)), Some(expected));
    assert_eq!(fim(&["<A>", "<B>", "<C>"], None), None);
}

#[test]
fn sentinels_are_no_text_even_where_the_file_says_that_they_are() {
    let tokenizer = Tokenizer::tiny_pieces(&["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "▁", "<", "▁<"]);
    assert_eq!(tokenizer.stop_tokens().as_ref(), [256, 257, 258, 259]);
    assert!((256..260).all(|id| tokenizer.is_special(id)) && !tokenizer.is_special(262));
}

/// Metadata of a byte-level vocabulary with these tokens behind the bytes and `th`, which one merge makes.
fn byte_level(added: &[(&str, TokenKind)]) -> TokenizerMetadata {
    let mut tokens: Vec<String> = (0..=255).map(|byte| byte_level::byte_char(byte).to_string()).collect();
    tokens.push("th".to_owned());
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    tokens.extend(added.iter().map(|(text, _)| (*text).to_owned()));
    kinds.extend(added.iter().map(|(_, kind)| *kind));
    TokenizerMetadata {
        model: TokenizerModel::ByteLevelBpe,
        pre: PreTokenizer::Named("gpt-2".to_owned()),
        tokens,
        kinds,
        scores: vec![],
        merges: vec![("t".to_owned(), "h".to_owned())],
        bos: None,
        eos: None,
        other_ends: vec![],
        fim: None,
        add_bos: None,
        spaces: Spaces::prefixed(false),
        strips: Strips::default(),
    }
}

#[test]
fn what_steers_the_model_is_no_text_whatever_type_the_file_gives_it() {
    for kind in [TokenKind::Normal, TokenKind::UserDefined, TokenKind::Unused] {
        let added = ["<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<own_end>"].map(|text| (text, kind));
        let mut metadata = byte_level(&added);
        metadata.other_ends = vec![260];
        let tokenizer = metadata.checked().and_then(Tokenizer::new).unwrap();
        let text = "<start_of_turn>th<end_of_turn><|im_start|><own_end>";
        assert_eq!(tokenizer.encode(text, Specials::Parse).unwrap(), [257, 256, 258, 259, 260], "{kind:?}");
        let as_text = tokenizer.encode(text, Specials::AsText).unwrap();
        assert!(as_text.iter().all(|id| *id <= 256), "{kind:?}: {as_text:?}");
        assert_eq!(tokenizer.stop_tokens().as_ref(), [258, 260]);
    }
}

#[test]
fn a_piece_of_sentence_piece_that_steers_the_model_is_no_text() {
    let tokenizer = Tokenizer::tiny_pieces(&["<start_of_turn>", "<end_of_turn>", "▁", "<", "▁<"]);
    assert_eq!(tokenizer.encode("<start_of_turn>", Specials::Parse).unwrap(), [256]);
    let as_text = tokenizer.encode("<end_of_turn>", Specials::AsText).unwrap();
    assert_eq!((as_text[0], decode(&tokenizer, &as_text).as_str()), (260, " <end_of_turn>"));
    assert_eq!(tokenizer.stop_tokens().as_ref(), [257]);
}

#[test]
fn ordinary_text_stays_text_even_where_it_looks_like_structure() {
    // HTML in Gemma's vocabulary; a piece that merges make; a comma that a file names for want of another.
    let mut metadata = byte_level(&[("</s>", TokenKind::UserDefined), ("[INST]", TokenKind::Normal)]);
    for (left, right) in [("[", "I"), ("[I", "N"), ("[IN", "S"), ("[INS", "T"), ("[INST", "]")] {
        if !metadata.tokens.contains(&format!("{left}{right}")) {
            metadata.tokens.push(format!("{left}{right}"));
            metadata.kinds.push(TokenKind::Normal);
        }
        metadata.merges.push((left.to_owned(), right.to_owned()));
    }
    metadata.bos = metadata.tokens.iter().position(|text| text == ",").map(|id| id as u32);
    let comma = metadata.bos.unwrap();
    let tokenizer = metadata.checked().and_then(Tokenizer::new).unwrap();
    let text = "</s>[INST],";
    let ids = tokenizer.encode(text, Specials::AsText).unwrap();
    assert_eq!((ids[0], decode(&tokenizer, &ids).as_str()), (257, text));
    assert!([257, 258, comma].iter().all(|id| !tokenizer.is_special(*id)));
    assert!(tokenizer.stop_tokens().is_empty());
}

#[test]
fn text_that_goes_on_from_other_text_has_no_space_before_it() {
    let tokenizer = Tokenizer::tiny_pieces(&["▁", "a", "▁a"]);
    assert_eq!(tokenizer.encode("a", Specials::AsText).unwrap(), [258]);
    assert_eq!(tokenizer.encode_continuation("a").unwrap(), [257]);
    assert_eq!(tokenizer.encode_continuation(" a").unwrap(), [258]);
}

#[test]
fn an_id_outside_the_vocabulary_is_special_and_has_no_bytes() {
    let tokenizer = Tokenizer::tiny(&[]);
    assert!(tokenizer.is_special(u32::MAX));
    assert!(tokenizer.token_bytes(u32::MAX).is_empty());
}

#[test]
fn an_unknown_pre_tokenizer_is_refused_by_name() {
    let metadata = TokenizerMetadata { pre: PreTokenizer::Named("strange-bpe".to_string()), ..byte_level(&[]) };
    let error = Tokenizer::new(metadata).expect_err("no such pre-tokenizer");
    assert!(error.to_string().contains("strange-bpe"), "{error}");
}

proptest! {
    #[test]
    fn any_text_comes_back_whole(text in any::<String>()) {
        let tokenizer = Tokenizer::tiny(&["<|im_end|>"]);
        let ids = tokenizer.encode(&text, Specials::AsText).unwrap();
        prop_assert_eq!(decode(&tokenizer, &ids), text);
    }
}
