// Tokens of PTX text.
#pragma once
#include <string>
#include <vector>

namespace ptx {

struct Token {
    enum Kind { word, punct, string, end } kind = end;
    std::string text;
    int line = 0;
    size_t begin = 0, stop = 0;  // where in the source
    bool is(const char* s) const { return kind != string && text == s; }
};

// A word takes letters, digits and _ $ % . as well as the :: of qualifiers. Comments vanish.
std::vector<Token> lex(const std::string& source);

}  // namespace ptx
