-- One command for many members: a call of Redis costs a script as much as the work in it.
-- add(name, first, second) collects members of the key `name`, one or two words each; send() runs the command once for
-- each key (for DEL and the like, which take only names, once).
local function batch(command)
  local names, members = {}, {}
  local calls = {}
  function calls.add(name, first, second)
    if not first then
      names[#names + 1] = name
      return
    end
    local list = members[name]
    if not list then
      list = {}
      members[name] = list
      names[#names + 1] = name
    end
    list[#list + 1] = first
    if second then list[#list + 1] = second end
  end
  function calls.send()
    if #names == 0 then return end
    if next(members) == nil then
      redis.call(command, unpack(names))
    else
      for _, name in ipairs(names) do redis.call(command, name, unpack(members[name])) end
    end
    names, members = {}, {}
  end
  return calls
end
