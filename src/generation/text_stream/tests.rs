use super::*;

const THE: u32 = 257;
const END: u32 = 258;

fn assembler(stop: &[&str], echo: Option<Echo>) -> TextAssembler {
    TextAssembler::new(TextStreamOptions {
        tokenizer: Arc::new(Tokenizer::tiny(&["<|end|>"])),
        num_prompt_tokens: 1,
        stop: stop.iter().map(|stop| stop.to_string()).collect(),
        logprobs: true,
        records_stop_token: true,
        shown_tokens: Vec::new(),
        output_prefix: String::new(),
        min_indent: 0,
        time_limit: None,
        echo,
    })
}

fn ids(delta: &TextDelta) -> Vec<u32> {
    delta.tokens.iter().map(|token| token.id).collect()
}

fn offsets(delta: &TextDelta) -> Vec<usize> {
    delta.tokens.iter().map(|token| token.text_offset).collect()
}

fn byte(byte: u8) -> u32 {
    u32::from(byte)
}

#[test]
fn half_a_character_and_its_token_wait_for_the_rest() {
    let mut assembler = assembler(&[], None);
    let [first, second] = "é".as_bytes() else { panic!("two bytes") };
    assert_eq!(assembler.token(byte(*first), None), (TextDelta::default(), false));
    let (delta, _) = assembler.token(byte(*second), None);
    assert_eq!((delta.text.as_str(), offsets(&delta)), ("é", vec![0, 0]));
    let (delta, _) = assembler.token(THE, None);
    assert_eq!((delta.text.as_str(), offsets(&delta)), ("the", vec![1]));
}

#[test]
fn a_stop_string_over_two_tokens_leaves_neither_its_text_nor_its_tokens() {
    let mut assembler = assembler(&["e!"], None);
    let (delta, stopped) = assembler.token(THE, None);
    assert_eq!((delta.text.as_str(), ids(&delta), stopped), ("th", vec![THE], false));
    let (delta, stopped) = assembler.token(byte(b'!'), None);
    assert_eq!((delta, stopped), (TextDelta::default(), true));
    assert_eq!(assembler.usage.num_output_tokens, 2);
}

#[test]
fn what_only_looked_like_a_stop_comes_at_the_end() {
    let mut assembler = assembler(&["the end"], None);
    assert_eq!(assembler.token(THE, None).0.text, "");
    let (delta, stopped) = assembler.end();
    assert_eq!((delta.text.as_str(), ids(&delta), stopped), ("the", vec![THE], false));
}

#[test]
fn special_tokens_have_a_record_but_no_text() {
    let mut assembler = assembler(&[], None);
    assert_eq!(assembler.token(END, None).0, TextDelta::default());
    assert_eq!(ids(&assembler.end().0), [END]);
}

#[test]
fn the_echo_comes_first_and_moves_the_offsets_of_the_output() {
    let echo = Echo { prompt_tokens: vec![END, THE, byte(b'n')], num_added_tokens: 1 };
    let mut assembler = assembler(&["n"], Some(echo));
    assembler.prompt_logprobs = vec![None, Some(TokenLogprob { logprob: -1.0, top: vec![] }), None];
    let (delta, stopped) = assembler.token(THE, None);
    assert_eq!((delta.text.as_str(), stopped), ("thenthe", false));
    assert_eq!((ids(&delta), offsets(&delta)), (vec![END, THE, byte(b'n'), THE], vec![0, 0, 3, 4]));
    assert_eq!(delta.tokens[1].logprob.as_ref().map(|logprob| logprob.logprob), Some(-1.0));
}

#[test]
fn the_stop_token_has_the_last_record_behind_an_echo_and_what_was_held_back() {
    let logprob = || TokenLogprob { logprob: -0.5, top: vec![] };
    let echo = Echo { prompt_tokens: vec![THE], num_added_tokens: 0 };
    let mut only_echo = assembler(&[], Some(echo));
    only_echo.stop_token(END, logprob());
    let (delta, _) = only_echo.end();
    assert_eq!((delta.text.as_str(), ids(&delta), offsets(&delta)), ("the", vec![THE, END], vec![0, 3]));
    assert_eq!(delta.tokens[1].logprob, Some(logprob()));

    let mut held = assembler(&["the end"], None);
    held.token(THE, None);
    held.stop_token(END, logprob());
    assert_eq!(ids(&held.end().0), [THE, END]);

    let mut unwanted = assembler(&[], None);
    unwanted.records_stop_token = false;
    unwanted.stop_token(END, logprob());
    assert_eq!(unwanted.end().0, TextDelta::default());
}

fn stream(stop: &[&str]) -> (mpsc::UnboundedSender<Event>, TextStream, Arc<crate::metrics::Metrics>) {
    let (events, receiver) = mpsc::unbounded_channel();
    let metrics = Arc::new(crate::metrics::Metrics::new("base"));
    let assembler = assembler(stop, None);
    let recorder = Recorder::new(metrics.clone(), "base", std::time::Instant::now());
    let (_, in_flight) = watch::channel(());
    let stream = TextStream {
        prediction: None,
        events: receiver,
        assembler,
        recorder,
        time_limit: None,
        alarm: None,
        ready: VecDeque::new(),
        ended: false,
        score: None,
        charged_to: None,
        _in_flight: in_flight,
    };
    (events, stream, metrics)
}

#[tokio::test]
async fn a_stop_string_closes_the_channel_so_that_the_engine_ends_too() {
    let (events, mut stream, metrics) = stream(&["h"]);
    events.send(Event::Token { id: THE, logprob: None }).unwrap();
    assert!(matches!(stream.next().await, Some(Ok(TextEvent::Delta(delta))) if delta.text == "t"));
    assert!(events.is_closed());
    let finished = stream.next().await;
    let Some(Ok(TextEvent::Finished { reason: FinishReason::Stop, stop, .. })) = finished else {
        panic!("{finished:?}");
    };
    assert_eq!(stop.as_deref(), Some("h"));
    assert!(stream.next().await.is_none());
    drop(stream);
    assert_eq!(metrics.of_adapter("base").requests().ended_total.with_label_values(&["stop"]).get(), 1);
}

#[tokio::test]
async fn an_engine_that_goes_away_is_an_error_not_an_end() {
    let (events, stream, metrics) = stream(&[]);
    events.send(Event::Token { id: THE, logprob: None }).unwrap();
    drop(events);
    assert!(matches!(stream.collect().await, Err(GenerationError::EngineStopped)));
    assert_eq!(metrics.of_adapter("base").requests().ended_total.with_label_values(&["error"]).get(), 1);
}

#[tokio::test]
async fn time_is_over_once_a_line_is_out() {
    let (events, mut stream, _) = stream(&[]);
    stream.time_limit = Some(Duration::ZERO);
    for byte in *b"a\nb" {
        events.send(Event::Token { id: u32::from(byte), logprob: None }).unwrap();
    }
    let completed = stream.collect().await.unwrap();
    assert_eq!((completed.text.as_str(), completed.reason), ("a\n", FinishReason::Length));
}

#[test]
fn a_line_outside_of_the_block_ends_the_output_and_is_cut() {
    let mut assembler = assembler(&[], None);
    assembler.block = Some(IndentedBlock::new(2));
    let text: Vec<_> = b"a\n  b\nc".iter().map(|byte| assembler.token(u32::from(*byte), None)).collect();
    assert_eq!(text.iter().map(|(delta, _)| delta.text.as_str()).collect::<String>(), "a\n  b");
    assert_eq!(text.iter().map(|(_, stopped)| *stopped).collect::<Vec<_>>(), [[false; 6].as_slice(), &[true]].concat());
}

#[test]
fn of_a_block_and_a_stop_string_the_one_that_ends_first_counts_and_all_before_it_is_there() {
    for (text, kept, found) in [
        // The text before a stop string keeps its white space, as it does without a block.
        ("a\n  X", "a\n  ", Some("X")),
        ("a\n\n  bX", "a\n\n  b", Some("X")),
        ("a\nX", "a\n", Some("X")),
        ("a X\n  b", "a ", Some("X")),
        // The line outside of the block has the stop string, but was cut before.
        ("a\n  b\ncX", "a\n  b", None),
        ("a\nb X", "a", None),
    ] {
        let mut single = assembler(&["X"], None);
        single.block = Some(IndentedBlock::new(2));
        let mut got = String::new();
        let has_ended = text.bytes().any(|byte| {
            let (delta, stopped) = single.token(u32::from(byte), None);
            got.push_str(&delta.text);
            stopped
        });
        assert_eq!((got.as_str(), has_ended, single.found_stop.as_deref()), (kept, true, found), "{text:?}");
        let mut whole = assembler(&["X"], None);
        whole.block = Some(IndentedBlock::new(2));
        let mut delta = TextDelta::default();
        assert!(whole.push_text(text, &mut delta), "{text:?}");
        assert_eq!((delta.text.as_str(), whole.found_stop.as_deref()), (kept, found), "{text:?}");
    }
}
