// ReluAttention and ReluAttentionLimited; the launch mirrors genrec/kernels/relu_attention/triton_forward.py. Parts of the keys
// never have programs of their own here: no result depends on that, and no workspace is needed.
#include "operators.h"
#include "plugin.h"

#include <algorithm>

namespace genrec {
namespace {

// ReluAttention(q (B, H, Lq, D), k (B, H, Lk, D), v (B, H, Lk, Dv), rel_bias (H, R); causal, scale, divisor, visible)
//     → (B, H, Lq, Dv)
// ReluAttentionLimited(q, k, v, key_limit (B, Lq), rel_bias; scale, divisor, visible): row i sees the first key_limit[i] keys
template <bool LIMITED>
class ReluAttention final : public Plugin {
 public:
  const char* name() const noexcept override { return LIMITED ? "ReluAttentionLimited" : "ReluAttention"; }
  std::vector<Tensor> inputs() const override {
    std::vector<Tensor> tensors{{"q", 'T', 4}, {"k", 'T', 4}, {"v", 'T', 4}, {"rel_bias", 'T', 2}};
    if (LIMITED) tensors.insert(tensors.begin() + 3, {"key_limit", 'l', 2});
    return tensors;
  }
  std::vector<Tensor> outputs() const override { return {{"out", 'T', 4}}; }
  std::vector<Attribute> attributes() override {
    std::vector<Attribute> attributes{
        {"scale", &scale_, nullptr}, {"divisor", &divisor_, nullptr}, {"visible", nullptr, &visible_}};
    if (!LIMITED) attributes.push_back({"causal", nullptr, &causal_});
    return attributes;
  }
  void check_attributes() const override {
    require(divisor_ >= 0,
            "divisor is " + std::to_string(divisor_) + "; expected a positive number, or 0 for the number of keys");
    require(visible_ == 0 || visible_ == 1, "visible is " + std::to_string(visible_) + "; expected 0 or 1");
    require(causal_ == 0 || causal_ == 1, "causal is " + std::to_string(causal_) + "; expected 0 or 1");
  }
  void output_shapes(const DimsExprs* in, DimsExprs* out, IExprBuilder&) const override {
    out[0] = in[0];
    out[0].d[3] = in[2].d[3];
  }
  IPluginV3* clone() noexcept override { return new ReluAttention(*this); }

  void measure(Descs in) override {
    const Dims& q = in[0].dims;
    batch_ = q.d[0], heads_ = q.d[1], rows_ = q.d[2], dim_ = q.d[3];
    keys_ = in[1].dims.d[2], dim_v_ = in[2].dims.d[3], buckets_ = in[kBias].dims.d[1];
    name_ = kernel_name("relu_attention", in[0].type,
                        {{"H", heads_}, {"D", dim_}, {"Dv", dim_v_}, {"limited", LIMITED}, {"causal", causal_},
                         {"visible", visible_}});
  }
  void check_shapes(Descs in) const override {
    expect_shape(in, 1, {batch_, heads_, keys_, dim_}, "(B, H, Lk, D)");
    expect_shape(in, 2, {batch_, heads_, keys_, dim_v_}, "(B, H, Lk, Dv)");
    if (LIMITED) expect_shape(in, 3, {batch_, rows_}, "(B, Lq)");
    expect_shape(in, kBias, {heads_, std::max<int64_t>(buckets_, 1)}, "(H, R)");
  }
  std::string kernels() const override { return name_; }

  void launch(const Launcher& launcher, const void* const* in, void* const* out, char*) const override {
    if (batch_ * rows_ == 0) return;
    const Image& image = launcher.find(name_, "forward", rows_);
    const int64_t blocks = ceil_div(rows_, image["BLOCK_M"]);
    const Argument limit = LIMITED ? Argument(in[3]) : None{};
    const auto [q, k] = std::pair(rows_ * dim_, std::max<int64_t>(keys_, 1) * dim_);  // strides of a head, as torch has them
    const auto [v, o] = std::pair(std::max<int64_t>(keys_, 1) * dim_v_, rows_ * dim_v_);
    launcher.launch(image, blocks * heads_ * batch_,
                    {in[0], in[1], in[2], out[0], None{}, None{}, None{}, limit, in[kBias], None{},
                     heads_ * q, q, dim_, heads_ * k, k, dim_, heads_ * v, v, dim_v_, heads_ * o, o, dim_v_,
                     LIMITED ? rows_ : 0, LIMITED ? 1 : 0,
                     batch_, heads_, rows_, keys_, batch_, 0, rows_, blocks, 1, buckets_, scale_, divisor_});
  }

 private:
  static constexpr int kBias = LIMITED ? 4 : 3;  // the input that holds rel_bias
  float scale_ = 0, divisor_ = 0;
  int32_t visible_ = 0, causal_ = 0;
  int64_t batch_ = 0, heads_ = 0, rows_ = 0, keys_ = 0, dim_ = 0, dim_v_ = 0, buckets_ = 0;
  std::string name_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* relu_attention() {
  static Creator<ReluAttention<false>> creator;
  return &creator;
}

nvinfer1::IPluginCreatorInterface* relu_attention_limited() {
  static Creator<ReluAttention<true>> creator;
  return &creator;
}

}  // namespace genrec
