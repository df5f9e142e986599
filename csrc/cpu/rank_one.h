// The routes whose Z is one number times one row (expand, ones, and gram on a pooled condition) without an R-wide
// product over the tokens: c_n = ⟨x̃_n, q⟩, out_n += c_n p, with q [d] and p [o] made once a condition.
#pragma once

#include "cpu/host.h"
#include "cpu/segments.h"

namespace routed_peft::cpu {

// out = base + bias + residual + Σ c p, all of it; c [rows, groups] is left for the backward.
template <class Acc>
void rank_one_forward(const Host& host, const Problem& p, const Acc* v, const Segments& cuts, const Matrix& out,
                      Acc* c);

// dx (the update's part, and the residual's), da, db from dout; and dv [conditions, R] unless nullptr.
template <class Acc>
void rank_one_backward(const Host& host, const Problem& p, const Acc* v, const Segments& cuts, const Backward& io,
                       Acc* dv);

}  // namespace routed_peft::cpu
