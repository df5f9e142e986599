// The whole routed layer on the CPU: what csrc/torch/ops.cpp calls, one function a direction.
#pragma once

#include "cpu/host.h"

namespace routed_peft::cpu {

void forward(const Host& host, const Problem& problem, const ForwardResult& result);
void backward(const Host& host, const Problem& problem, const Backward& io);

// A condition alone: state (accumulated dtype) and, if present, what its backward needs (as ForwardResult::kept).
void encode(const Host& host, const Problem& problem, void* state, const Matrix& kept);
void encode_backward(const Host& host, const Problem& problem, const void* dstate, const Matrix& kept, const Matrix& dy,
                     const Matrix& dc, const Matrix& db_c);

}  // namespace routed_peft::cpu
