//! Attention in blocks. The weights of attention are as many values as all else that it keeps, times
//! the length of a sequence. So they are not kept, and the backward pass computes them again, for as
//! many heads at a time as stay in the cache.

use std::ops::Range;

use burn::{
    backend::Dispatch,
    tensor::{Bool, Tensor},
};

#[cfg(feature = "rayon")]
use rayon::prelude::*;

use super::cost;
use crate::rows::{Attention, ExactOps, RowOps, random::Dropout};

#[cfg(feature = "autodiff")]
pub(super) mod tracked;

/// Queries, keys and values, shape `[batch, heads, length, d_head]`.
type Inputs = [Tensor<4>; 3];
/// Masks of keys and of pairs, true where a query does not attend to a key. Each broadcasts to
/// `[batch, heads, queries, keys]`. They stay apart, because all layers share them as they are.
type Masks = [Option<Tensor<4, Bool>>; 2];

/// The output of each head, and what the backward pass needs to compute its weights again.
pub(crate) fn forward(inputs: Inputs, masks: &Masks, attention: Attention) -> [Tensor<4>; 2] {
    let [_, heads, queries, _] = inputs[0].dims();
    in_blocks(&inputs, masks, |[query, key, value], masks, block| {
        let scores = scores(query, key, &masks, attention);
        let softmax = Dispatch::memaop_softmax(scores.into_dispatch(), attention.quiet);
        let weights = Tensor::<4>::from_dispatch(softmax.weights);
        let weights = dropped(weights, attention.dropout, &block, [heads, queries]);
        [weights.matmul(value), Tensor::from_dispatch(softmax.rows)]
    })
}

/// The gradients of queries, keys and values, from that of the output.
#[cfg(feature = "autodiff")]
fn backward(
    inputs: Inputs,
    masks: &Masks,
    rows: Tensor<4>,
    grad: Tensor<4>,
    attention: Attention,
) -> [Tensor<4>; 3] {
    let [_, heads, queries, _] = grad.dims();
    in_blocks(&inputs, masks, |[query, key, value], masks, block| {
        let scores = scores(query.clone(), key.clone(), &masks, attention);
        let [rows, grad] = [&rows, &grad].map(|all| of_block(all, &block));
        let weights = Dispatch::memaop_weights(scores.into_dispatch(), rows.into_dispatch());
        let weights = Tensor::<4>::from_dispatch(weights);
        let drop = |weights| dropped(weights, attention.dropout, &block, [heads, queries]);
        let of_value = drop(weights.clone()).transpose().matmul(grad.clone());
        let of_weights = drop(grad.matmul(value.transpose()));
        let of_scores = Tensor::<4>::from_dispatch(Dispatch::memaop_softmax_backward(
            weights.into_dispatch(),
            of_weights.into_dispatch(),
        ));
        // A masked score is a constant, also where all scores of a query are masked.
        let of_scores = filled(of_scores, &masks, 0.0);
        let of_key = of_scores.clone().transpose().matmul(query);
        [of_scores.matmul(key), of_key, of_value]
    })
}

fn scores(query: Tensor<4>, key: Tensor<4>, masks: &Masks, attention: Attention) -> Tensor<4> {
    filled(query.matmul(key.transpose()), masks, attention.min_float)
}

fn filled(scores: Tensor<4>, masks: &Masks, value: f64) -> Tensor<4> {
    let fill = |scores: Tensor<4>, mask: &Tensor<4, Bool>| scores.mask_fill(mask.clone(), value);
    masks.iter().flatten().fold(scores, fill)
}

/// The weights of a block, or their gradients, after the dropout, which draws by the row of all
/// `[batch * heads * queries]` that it belongs to.
fn dropped(
    weights: Tensor<4>,
    dropout: Option<Dropout>,
    block: &Block,
    [heads, queries]: [usize; 2],
) -> Tensor<4> {
    let Some(dropout) = dropout else {
        return weights;
    };
    let dims = weights.dims();
    let dropout = Dropout {
        first: (block[0].start * heads + block[1].start) * queries,
        ..dropout
    };
    let rows = weights.reshape([dims[0] * dims[1] * dims[2], dims[3]]);
    let rows = Dispatch::memaop_drop_values(rows.into_dispatch(), dropout);
    Tensor::<2>::from_dispatch(rows).reshape(dims)
}

/// Some sequences, and some heads of them.
type Block = [Range<usize>; 2];

/// Computes blocks of all heads of some sequences, or of some heads of one, and puts the results
/// together.
fn in_blocks<const N: usize>(
    inputs: &Inputs,
    masks: &Masks,
    compute: impl Fn(Inputs, Masks, Block) -> [Tensor<4>; N] + Sync,
) -> [Tensor<4>; N] {
    let [query, key, _] = inputs;
    let [batch, heads, queries, _] = query.dims();
    let device = query.device();
    // Scores are computed in single precision at least.
    let of_head = queries * key.dims()[2] * query.dtype().size().max(4);
    let block = cost::attention_block(device.as_dispatch());
    let most = (block / of_head.max(1)).max(1);
    let (sequences, at_once) = match most >= heads {
        true => ((most / heads.max(1)).clamp(1, batch.max(1)), heads),
        false => (1, most),
    };
    let part = |block: Block| {
        let inputs = inputs.each_ref().map(|input| of_block(input, &block));
        let masks = masks.each_ref().map(|mask| {
            let mask = mask.as_ref()?;
            Some(match mask.dims()[0] == batch && batch > block[0].len() {
                true => mask.clone().slice([block[0].clone()]),
                false => mask.clone(),
            })
        });
        compute(inputs, masks, block)
    };
    if sequences >= batch && at_once >= heads {
        return part([0..batch, 0..heads]);
    }
    let starts = (0..batch).step_by(sequences).flat_map(|sequence| {
        let heads = (0..heads).step_by(at_once);
        heads.map(move |head| (sequence, head))
    });
    let blocks = starts.map(|(sequence, head)| {
        [
            sequence..batch.min(sequence + sequences),
            head..heads.min(head + at_once),
        ]
    });
    // The blocks that are computed at the same time must not fill the memory.
    let in_flight = threads() * of_head.max(block);
    let parallel = in_flight <= MOST_IN_FLIGHT && cost::is_cpu(device.as_dispatch());
    let mut parts = all(blocks.collect(), part, parallel).into_iter();
    let rows = (0..batch).step_by(sequences).map(|_| {
        let row = parts.by_ref().take(heads.div_ceil(at_once));
        joined(row.collect(), 1)
    });
    joined(rows.collect(), 0)
}

/// The bytes of scores that are computed at the same time.
const MOST_IN_FLIGHT: usize = 64 << 20;

fn threads() -> usize {
    #[cfg(feature = "rayon")]
    return rayon::current_num_threads();
    #[cfg(not(feature = "rayon"))]
    1
}

/// Computes all blocks, one after the other or at the same time. The results are the same.
fn all<T: Send>(
    blocks: Vec<Block>,
    compute: impl Fn(Block) -> T + Send + Sync,
    parallel: bool,
) -> Vec<T> {
    #[cfg(feature = "rayon")]
    if parallel {
        return blocks.into_par_iter().map(compute).collect();
    }
    let _ = parallel;
    blocks.into_iter().map(compute).collect()
}

fn of_block(tensor: &Tensor<4>, [sequences, heads]: &Block) -> Tensor<4> {
    let dims = tensor.dims();
    match sequences.len() == dims[0] && heads.len() == dims[1] {
        true => tensor.clone(),
        false => tensor.clone().slice([sequences.clone(), heads.clone()]),
    }
}

fn joined<const N: usize>(mut parts: Vec<[Tensor<4>; N]>, axis: usize) -> [Tensor<4>; N] {
    if parts.len() == 1 {
        return parts.swap_remove(0);
    }
    std::array::from_fn(|part| {
        Tensor::cat(
            parts.iter().map(|parts| parts[part].clone()).collect(),
            axis,
        )
    })
}
